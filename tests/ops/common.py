"""Helpers for tests of single ops: dtypes by device, launch counting, and the tolerance rule over seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from trm_kernels.ops import INTERPRET
from trm_kernels.ops._launch import LAUNCHES
from trm_kernels.testing import SEEDS, ToleranceRule

#: With this order, the grid of whole networks has the most rows in float32 and the fewest in float16.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: gradcheck runs the kernels in float64, which only the interpreter supports.
FLOAT64 = torch.float64 if INTERPRET else None


@contextmanager
def launched(*kernels: str) -> Iterator[None]:
    """Assert that each of these kernels runs inside the block."""
    before = LAUNCHES.copy()
    yield
    for kernel in kernels:
        assert LAUNCHES[kernel] > before[kernel], f"{kernel} was not launched"


Case = dict[str, Tensor]


def gradients(function: Callable[..., Tensor], inputs: Case, grad: Tensor) -> Case:
    """Return the output and the gradients of every floating-point input."""
    leaves = {
        name: value.detach().clone().requires_grad_() if value.is_floating_point() else value
        for name, value in inputs.items()
    }
    out = function(**leaves)
    out.backward(grad.to(out.dtype))
    found = {"output": out.detach()}
    for name, leaf in leaves.items():
        if leaf.is_floating_point():
            assert leaf.grad is not None, f"{name} received no gradient"
            found[name] = leaf.grad
    return found


def check_rule(
    ours: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    make: Callable[[], Case],
    dtype: torch.dtype,
    seeds: int = SEEDS,
) -> None:
    """Check outputs and gradients of ``ours`` against the tolerance rule on random inputs.

    ``make`` draws inputs in float64. Both implementations receive them rounded to ``dtype``, and the truth is
    ``reference`` on the rounded values in float64. In the interpreter, where a pass takes seconds, ``seeds``
    may be less than eight; a GPU always pools eight.
    """
    rule = ToleranceRule(dtype)
    for seed in range(seeds if INTERPRET else SEEDS):
        torch.manual_seed(seed)
        inputs = {
            name: value.to(dtype) if value.is_floating_point() else value for name, value in make().items()
        }
        wide = {
            name: value.double() if value.is_floating_point() else value for name, value in inputs.items()
        }
        grad = torch.randn_like(reference(**inputs))
        mine = gradients(ours, inputs, grad)
        eager = gradients(reference, inputs, grad)
        truth = gradients(reference, wide, grad.double())
        for name in truth:
            rule.add(name, mine[name], eager[name], truth[name])
    rule.check()
