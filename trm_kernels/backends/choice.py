"""Which backend runs a network, and the reasons for a refusal.

The choice is read, nearest first, from the ``backend=`` argument, from :func:`use_backend`, from the
environment variable ``TRM_BACKEND`` (read once, at import), and is ``"auto"`` otherwise. A named backend
that cannot serve a call raises :class:`BackendError` with the reason; ``auto`` takes the next one, and
:func:`select` tells what it took and what it passed over.
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
    """A backend that was asked for by name cannot serve the call."""


@dataclass(frozen=True)
class Selection:
    """The backend that serves a call, and the reason for each one that was passed over."""

    name: str
    passed_over: dict[str, str] = field(default_factory=dict)


_ENVIRONMENT = os.environ.get("TRM_BACKEND") or "auto"
# Plain module state: torch.compile guards it (it cannot see a ContextVar), and the recomputation of a
# checkpoint, which runs on autograd's own threads, sees the same choice.
_context: str | None = None


def validate_name(name: str, source: str = "") -> str:
    """Return ``name``, or raise ValueError, its message led by ``source``, if it names no backend."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{source}unknown backend {name!r}: choose from auto, {', '.join(BACKENDS)}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the backend of every network called inside the ``with`` block, in the whole process.

    Like ``torch.nn.attention.sdpa_kernel`` it is not local to a thread. Networks built with an explicit
    ``backend=`` keep theirs.
    """
    global _context
    previous, _context = _context, validate_name(name)
    try:
        yield
    finally:
        _context = previous


def requested(argument: str | None = None) -> str:
    """The backend that argument, context and environment ask for: a name, or ``"auto"``."""
    if argument is not None:
        return validate_name(argument)
    if _context is not None:
        return _context
    return validate_name(_ENVIRONMENT, "TRM_BACKEND: ")


def refusal(name: str, net: FusedModule, x: Tensor, mask: Tensor | None = None) -> Refusal:
    """Why backend ``name`` cannot serve this call, or None if it can."""
    backend = BACKENDS[name]
    reason = backend.unavailable()
    return reason if reason is not None else backend.refuses(net, x, mask)


def select(net: FusedModule, x: Tensor, mask: Tensor | None = None) -> Selection:
    """The backend that a call ``net(x, mask)`` runs on, and why others were passed over.

    Raises:
        BackendError: A backend asked for by name refuses the call.
    """
    name = requested(net.backend)
    if name != "auto":
        reason = refusal(name, net, x, mask)
        if reason is not None:
            raise BackendError(f"backend {name!r} cannot serve this call: {reason}")
        return Selection(name)
    passed_over: dict[str, str] = {}
    for name in AUTO_ORDER.get(x.device.type, AUTO_ORDER[ANYWHERE]):
        reason = refusal(name, net, x, mask) or BACKENDS[name].slower(net, x)
        if reason is None:
            break
        passed_over[name] = reason
    return Selection(name, passed_over)


def run(net: FusedModule, x: Tensor, mask: Tensor | None) -> Tensor:
    """Run a network on the backend that :func:`select` names."""
    return BACKENDS[select(net, x, mask).name].run(net, x, mask)
