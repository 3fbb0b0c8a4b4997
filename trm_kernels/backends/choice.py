"""Selection of the backend that runs a network.

The selection comes from the ``backend=`` argument, :func:`use_backend` or the environment variable
``TRM_BACKEND`` (read once, at import), in this order of precedence. The default is ``"auto"``. If a named
backend cannot handle a call, it raises :class:`BackendError` with the reason; ``auto`` tries the next
backend, and :func:`select` reports which one it chose and which it skipped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from trm_kernels.backends.registry import ANYWHERE, AUTO_ORDER, BACKENDS, Refusal

if TYPE_CHECKING:
    from trm_kernels.module import FusedModule


class BackendError(RuntimeError):
    """A backend that was requested by name cannot handle the call."""


@dataclass(frozen=True)
class Selection:
    """The backend that runs a call, and the reason for each backend that was skipped."""

    name: str
    passed_over: dict[str, str] = field(default_factory=dict)


_ENVIRONMENT = os.environ.get("TRM_BACKEND") or "auto"
# Plain module state rather than a ContextVar: torch.compile can guard it, and the recomputation of a
# checkpoint, which runs on autograd's threads, sees the same value.
_context: str | None = None


def validate_name(name: str, source: str = "") -> str:
    """Return ``name``; raise ValueError, with the prefix ``source``, if there is no such backend."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{source}unknown backend {name[:40]!r}: choose from auto, {', '.join(BACKENDS)}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Set the backend of every network called inside the ``with`` block, in the whole process.

    Like ``torch.nn.attention.sdpa_kernel``, it is not thread-local. Networks built with an explicit
    ``backend=`` keep their own.
    """
    global _context
    previous, _context = _context, validate_name(name)
    try:
        yield
    finally:
        _context = previous


def requested(argument: str | None = None) -> str:
    """Return the backend that the argument, context or environment requests: a name, or ``"auto"``."""
    if argument is not None:
        return validate_name(argument)
    if _context is not None:
        return _context
    return validate_name(_ENVIRONMENT, "TRM_BACKEND: ")


def refusal(name: str, net: FusedModule, x: Tensor, mask: Tensor | None = None) -> Refusal:
    """Return why backend ``name`` cannot handle this call, or None if it can."""
    backend = BACKENDS[name]
    reason = backend.unavailable()
    return reason if reason is not None else backend.refuses(net, x, mask)


def select(net: FusedModule, x: Tensor, mask: Tensor | None = None) -> Selection:
    """Return the backend that a call ``net(x, mask)`` runs on, and why others were skipped.

    Raises:
        BackendError: If a backend was requested by name and cannot handle the call.
    """
    name = requested(net.backend)
    if name != "auto":
        reason = refusal(name, net, x, mask)
        if reason is not None:
            raise BackendError(f"backend {name!r} cannot handle this call: {reason}")
        return Selection(name)
    passed_over: dict[str, str] = {}
    for name in AUTO_ORDER.get(x.device.type, AUTO_ORDER[ANYWHERE]):
        reason = refusal(name, net, x, mask) or BACKENDS[name].slower(net, x)
        if reason is None:
            break
        passed_over[name] = reason
    return Selection(name, passed_over)


def run(net: FusedModule, x: Tensor, mask: Tensor | None) -> Tensor:
    """Run a network on the backend that :func:`select` returns."""
    return BACKENDS[select(net, x, mask).name].run(net, x, mask)
