"""A recursion as individual calls of a network."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trm_kernels.backends.choice import requested, use_backend


def step_by_step(
    call: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, z: Tensor, n: int, memory: str
) -> tuple[Tensor, Tensor]:
    """Run a latent recursion as n + 1 calls of a network, on states of any common shape."""
    recompute = memory == "small" and torch.is_grad_enabled()

    def step(h: Tensor) -> Tensor:
        if not recompute:
            return call(h)
        # Recompute with the same backend, because another one would save different tensors.
        again = use_backend(requested())
        return checkpoint(call, h, use_reentrant=False, context_fn=lambda: (nullcontext(), again))

    question = x + y  # constant over the n steps
    for _ in range(n):
        z = step(question + z)
    return step(y + z), z
