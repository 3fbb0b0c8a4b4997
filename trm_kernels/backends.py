"""Which implementation runs a network: registry, choice, and the reasons for a refusal.

The choice is read, nearest first, from the ``backend=`` argument, from :func:`use_backend`, from the
environment variable ``TRM_BACKEND`` (read once, at import), and is ``"auto"`` otherwise. A named backend
that cannot serve a call raises :class:`BackendError` with the reason; ``auto`` takes the next one, and
:func:`select` tells what it took and what it passed over.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trm_kernels import native_module

if TYPE_CHECKING:
    from trm_kernels.network import FusedModule
    from trm_kernels.packing import Packing

Refusal = str | None


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot serve the call."""


def _never_slower(net: FusedModule, x: Tensor) -> Refusal:
    return None


@dataclass(frozen=True)
class Backend:
    """One way to run a :class:`~trm_kernels.network.FusedModule`.

    Attributes:
        name: What users write.
        summary: One line for ``llm-trm env``.
        unavailable: Why it cannot work in this process at all, or None.
        refuses: Why it cannot serve this call (network, input [B, L, D], mask [B, L]), or None.
        run: Runs the network on an input and mask that it does not refuse.
        recursion: Where it can run a whole recursion at once.
        packed: Where it can leave out padding, which one of the former does by itself.
        slower: Why the next backend would be faster for this call, or None. Only ``auto`` asks.
    """

    name: str
    summary: str
    unavailable: Callable[[], Refusal]
    refuses: Callable[[FusedModule, Tensor, Tensor | None], Refusal]
    run: Callable[[FusedModule, Tensor, Tensor | None], Tensor]
    recursion: FusedRecursion | None = None
    packed: PackedRecursion | None = None
    slower: Callable[[FusedModule, Tensor], Refusal] = _never_slower


@dataclass(frozen=True)
class FusedRecursion:
    """A backend's own recursion.

    Attributes:
        refuses: Why a recursion over a network that the backend serves must call it step by step, or None:
            network, states [B, L, D], what is applied after every call, and the precision asked for.
        run: ``run(net, x, y, z, n, T=, ...)``, with all arguments of
            :func:`~trm_kernels.recursion.deep_recursion`, on states of one shape and dtype.
    """

    refuses: Callable[[FusedModule, Sequence[Tensor], object, str | None], Refusal]
    run: Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class PackedRecursion:
    """A recursion that calls the network step by step, but on the valid positions alone.

    Attributes:
        refuses: Why a recursion must run on the padded batch, or None: network, states [B, L, D], mask.
        run: As for :class:`FusedRecursion`.
    """

    refuses: Callable[[FusedModule, Sequence[Tensor], Tensor | Packing], Refusal]
    run: Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Selection:
    """The backend that serves a call, and the reason for each one that was passed over."""

    name: str
    passed_over: dict[str, str] = field(default_factory=dict)


def _always(*_: object) -> Refusal:
    return None


def _run_eager(net: FusedModule, x: Tensor, mask: Tensor | None) -> Tensor:
    return net.forward_eager(x, mask)


def _refuses_packed(net: FusedModule, states: Sequence[Tensor], mask: Tensor | Packing) -> Refusal:
    from trm_kernels import packed

    return packed.refuses(net, states, mask)


def _run_eager_packed(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    from trm_kernels import packed

    return packed.run_recursion(*args, **options)


def _run_compile_packed(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    from trm_kernels import packed

    return packed.run_recursion(*args, **options, compiled=True)


def _compile_refuses(net: FusedModule, x: Tensor, mask: Tensor | None) -> Refusal:
    if torch.compiler.is_compiling():
        return None  # the outer torch.compile takes the reference into its own graph
    if x.device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        return "torch.compile needs a C++ compiler for CPU code and found neither g++ nor clang++"
    if x.device.type == "cuda" and (reason := _triton_missing()) is not None:
        return f"torch.compile writes Triton code for GPUs: {reason}"
    if x.numel() == 0:
        return "the batch is empty"
    return None


def _run_compile(net: FusedModule, x: Tensor, mask: Tensor | None) -> Tensor:
    from trm_kernels import compiled

    return compiled.run(net, x, mask)


def _triton_missing() -> Refusal:
    from trm_kernels import ops

    return ops.MISSING


def _triton_unavailable() -> Refusal:
    from trm_kernels import ops

    return ops.UNAVAILABLE


def _triton_refuses(net: FusedModule, x: Tensor, mask: Tensor | None) -> Refusal:
    from trm_kernels import fused_checks

    return fused_checks.refuses(net, x, mask)


def _run_triton(net: FusedModule, x: Tensor, mask: Tensor | None) -> Tensor:
    from trm_kernels import fused

    return fused.run(net, x, mask)


def _triton_refuses_recursion(
    net: FusedModule, states: Sequence[Tensor], output_norm: object, precision: str | None
) -> Refusal:
    from trm_kernels import fused_checks

    return fused_checks.refuses_recursion(net, states, output_norm, precision)


def _run_triton_recursion(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    from trm_kernels import fused

    return fused.run_recursion(*args, **options)


def _native_refuses(net: FusedModule, x: Tensor, mask: Tensor | None) -> Refusal:
    from trm_kernels import native

    return native.refuses(net, x, mask)


def _native_slower(net: FusedModule, x: Tensor) -> Refusal:
    from trm_kernels import native

    return native.slower(net, x)


def _run_native(net: FusedModule, x: Tensor, mask: Tensor | None) -> Tensor:
    from trm_kernels import native

    return native.run(net, x, mask)


def _native_refuses_recursion(
    net: FusedModule, states: Sequence[Tensor], output_norm: object, precision: str | None
) -> Refusal:
    from trm_kernels import native

    return native.refuses_recursion(net, states, output_norm, precision)


def _run_native_recursion(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    from trm_kernels import native

    return native.run_recursion(*args, **options)


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(
            "eager",
            "the reference, plain PyTorch",
            _always,
            _always,
            _run_eager,
            packed=PackedRecursion(_refuses_packed, _run_eager_packed),
        ),
        Backend(
            "compile",
            "the reference under torch.compile",
            _always,
            _compile_refuses,
            _run_compile,
            packed=PackedRecursion(_refuses_packed, _run_compile_packed),
        ),
        Backend(
            "triton",
            "fused Triton kernels",
            _triton_unavailable,
            _triton_refuses,
            _run_triton,
            FusedRecursion(_triton_refuses_recursion, _run_triton_recursion),
        ),
        Backend(
            "native",
            "C++ kernels for CPUs",
            native_module.unavailable,
            _native_refuses,
            _run_native,
            FusedRecursion(_native_refuses_recursion, _run_native_recursion),
            slower=_native_slower,
        ),
    )
}

#: What ``auto`` tries, by device. torch.compile is left out on CPUs: it is 1.05 to 1.2 times as fast as
#: eager there (bench/results/cpu.jsonl), and takes tens of seconds to compile, unasked.
AUTO_ORDER: dict[str, tuple[str, ...]] = {
    "cuda": ("triton", "compile", "eager"),
    "cpu": ("native", "eager"),
}
_AUTO_ELSEWHERE = ("eager",)

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
    for name in AUTO_ORDER.get(x.device.type, _AUTO_ELSEWHERE):
        reason = refusal(name, net, x, mask) or BACKENDS[name].slower(net, x)
        if reason is None:
            break
        passed_over[name] = reason
    return Selection(name, passed_over)


def run(net: FusedModule, x: Tensor, mask: Tensor | None) -> Tensor:
    """Run a network on the backend that :func:`select` names."""
    return BACKENDS[select(net, x, mask).name].run(net, x, mask)
