"""The ``compile`` backend: the reference under torch.compile, without recompiles inside a recursion.

A recursion flips what torch.compile guards on: grad mode (T - 1 recursions run without gradient) and
``requires_grad`` of the input (the first input of a step is detached, the next carries a graph). Compiled
naively, those flips and the batch shapes pass the recompile limit within one recursion. So there are two
functions, one for each grad mode, and each always sees the same ``requires_grad``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trm_kernels.config import NetworkConfig

if TYPE_CHECKING:
    from trm_kernels.network import FusedModule


def _forward(net: FusedModule, x: Tensor, mask: Tensor | None) -> Tensor:
    return net.forward_eager(x, mask)


@functools.cache
def _compiled(config: NetworkConfig, grad: bool) -> Callable[..., Tensor]:
    """One compiled function for each configuration and grad mode."""
    # torch.compile counts recompiles by code object (the limit is 8), so each function owns a copy.
    code: CodeType = _forward.__code__.replace(co_name="tiny_network_grad" if grad else "tiny_network")
    # fullgraph: past the limit torch.compile raises here instead of running eager code unasked.
    return torch.compile(FunctionType(code, globals()), fullgraph=True)


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
