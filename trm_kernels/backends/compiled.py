"""The ``compile`` backend: the reference under torch.compile, without recompilation inside a recursion.

A recursion changes properties that torch.compile guards on: grad mode (T - 1 recursions run without
gradients) and ``requires_grad`` of the input (the first input of a step is detached, the next has a graph).
With naive compilation, these changes and the batch shapes exceed the recompile limit within one recursion.
Therefore there are two functions, one per grad mode, and each always sees the same ``requires_grad``.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor

from trm_kernels import ops
from trm_kernels.backends import packed
from trm_kernels.backends.registry import Backend, PackedRecursion, Refusal
from trm_kernels.config import NetworkConfig
from trm_kernels.module import FusedModule


def refuses(net: FusedModule, x: Tensor, mask: Tensor | None) -> Refusal:
    """Return why torch.compile cannot handle this call, or None if it can."""
    if torch.compiler.is_compiling():
        return None  # the outer torch.compile traces the reference into its own graph
    if x.device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        return "torch.compile needs a C++ compiler for CPU code and found neither g++ nor clang++"
    if x.device.type == "cuda" and ops.MISSING is not None:
        return f"torch.compile generates Triton code for GPUs: {ops.MISSING}"
    if x.numel() == 0:
        return "the batch is empty"
    return None


def _forward(net: FusedModule, x: Tensor, mask: Tensor | None) -> Tensor:
    return net.forward_eager(x, mask)


@functools.cache
def _compiled(config: NetworkConfig, grad: bool) -> Callable[..., Tensor]:
    """Return the compiled function for this configuration and grad mode."""
    return _compile_copy(_forward, "tiny_network_grad" if grad else "tiny_network")


@functools.cache
def _compiled_rows(part: Callable[..., Tensor], config: NetworkConfig, grad: bool) -> Callable[..., Tensor]:
    """Return the same for a part of a network on packed rows."""
    return _compile_copy(part, f"tiny_network{part.__name__}{'_grad' if grad else ''}")


def _compile_copy(function: Any, name: str) -> Callable[..., Tensor]:
    # torch.compile counts recompilations per code object (the limit is 8), so each function gets a copy.
    code: CodeType = function.__code__.replace(co_name=name)
    # fullgraph=True: beyond the limit, torch.compile raises instead of silently running eager code.
    return torch.compile(FunctionType(code, function.__globals__), fullgraph=True)


def run(net: FusedModule, x: Tensor, mask: Tensor | None) -> Tensor:
    """Run ``net`` on ``x`` [B, L, D] and ``mask`` [B, L] as compiled code."""
    if torch.compiler.is_compiling():
        return net.forward_eager(x, mask)
    grad = torch.is_grad_enabled() and (
        x.requires_grad or any(parameter.requires_grad for parameter in net.parameters())
    )
    if not grad:
        x = x.detach()
    elif not x.requires_grad:
        x = x.detach().requires_grad_()
    return _compiled(net.config, grad)(net, x, mask)


def run_rows(part: Callable[..., Tensor], config: NetworkConfig, h: Tensor, *args: Any) -> Tensor:
    """Run ``part(config, h, *args)`` on packed rows ``h`` [R, D] as compiled code.

    Args:
        args: Tensors, or tuples of tensors and None.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in _tensors(h, *args)):
        return _compiled_rows(part, config, True)(
            config, h if h.requires_grad else h.detach().requires_grad_(), *args
        )
    return _compiled_rows(part, config, False)(config, h, *args)


def _tensors(*args: Any) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, tuple):
            yield from _tensors(*arg)
        elif arg is not None:
            yield arg


BACKEND = Backend(
    "compile",
    "the reference under torch.compile",
    unavailable=lambda: None,
    refuses=refuses,
    run=run,
    packed=PackedRecursion(packed.refuses, functools.partial(packed.run_recursion, run_part=run_rows)),
    # Not on CPUs: there it is only 1.05 to 1.2 times as fast as eager (bench/results/cpu.jsonl), and
    # compiling takes tens of seconds, which the user did not ask for.
    auto=("cuda",),
)
