"""The tolerance rule that every kernel must meet, and the grids it is tested on.

The tests use it, and so does the benchmark, which reports no speed for a wrong result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

#: Half the distance between 1 and the next representable number.
UNIT_ROUNDOFF = {
    dtype: torch.finfo(dtype).eps / 2
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}

#: Lengths at which every block is tested: one row, tile edges, Sudoku, Sudoku + 16, a tile plus one row.
LENGTHS = (1, 2, 31, 64, 81, 97, 257)

#: Seeds whose squared errors are pooled before the rule is applied.
SEEDS = 8


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """Return ``||actual - truth|| / ||truth||`` in the Frobenius norm; NaN if ``actual`` contains NaN."""
    pool = ErrorPool()
    pool.add(actual, truth)
    return pool.error


@dataclass
class ErrorPool:
    """Squared norms of the difference and of the truth, summed over seeds."""

    difference: float = 0.0
    reference: float = 0.0

    def add(self, actual: Tensor, truth: Tensor) -> None:
        """Add one comparison of tensors with equal shapes and any dtypes."""
        if actual.shape != truth.shape:
            raise AssertionError(f"shape {list(actual.shape)}, expected {list(truth.shape)}")
        wide = truth.detach().to("cpu", torch.float64)
        self.difference += (actual.detach().to("cpu", torch.float64) - wide).square().sum().item()
        self.reference += wide.square().sum().item()

    @property
    def error(self) -> float:
        """Relative Frobenius error over all added comparisons."""
        if math.isnan(self.difference) or math.isnan(self.reference):
            return math.nan
        if self.reference == 0.0:
            return 0.0 if self.difference == 0.0 else math.inf
        return math.sqrt(self.difference / self.reference)


@dataclass
class ToleranceRule:
    """``error(ours, fp64) <= 2 error(eager, fp64) + u``, relative Frobenius errors pooled over seeds.

    Maximum-absolute criteria reject correct code in 1.6% of tiny cases; pooling does not.

    Args:
        dtype: Dtype in which both implementations compute; u is its unit roundoff.
    """

    dtype: torch.dtype
    pools: dict[str, tuple[ErrorPool, ErrorPool]] = field(default_factory=dict)

    def add(self, name: str, ours: Tensor, eager: Tensor, truth: Tensor) -> None:
        """Add one tensor (an output or a gradient) of one seed."""
        mine, theirs = self.pools.setdefault(name, (ErrorPool(), ErrorPool()))
        mine.add(ours, truth)
        theirs.add(eager, truth)

    def failures(self) -> list[str]:
        """Return one line per tensor that violates the rule. NaN always violates it."""
        lines = []
        for name, (mine, theirs) in self.pools.items():
            bound = 2.0 * theirs.error + UNIT_ROUNDOFF[self.dtype]
            if not mine.error <= bound:
                lines.append(f"{name}: error {mine.error:.3g} > {bound:.3g} (eager: {theirs.error:.3g})")
        return lines

    def check(self) -> None:
        """Raise AssertionError if any tensor violates the rule, or if nothing was compared."""
        if not self.pools:
            raise AssertionError("nothing was compared")
        failures = self.failures()
        if failures:
            raise AssertionError("; ".join(failures))


def outputs_and_gradients(
    function: Callable[..., Tensor], module: nn.Module, x: Tensor, *args: Tensor | None
) -> Iterator[tuple[str, Tensor]]:
    """Yield ``("output", ...)``, ``("x", ...)`` and every parameter gradient of ``function(x, *args)``.

    The output gradient is a fixed pattern of unit scale that depends only on the shape, so that
    implementations in different dtypes get the same one.
    """
    module.zero_grad(set_to_none=True)
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = function(x, *args)
    generator = torch.Generator().manual_seed(out.numel())
    weight = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    out.backward(weight.to(out.device, out.dtype))
    yield "output", out.detach()
    assert x.grad is not None
    yield "x", x.grad
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, f"{name} received no gradient"
        yield name, parameter.grad


def recursion_and_gradients(
    net: nn.Module,
    norm: nn.Module | None,
    inputs: Sequence[Tensor],
    directions: Sequence[Tensor],
    **options: Any,
) -> dict[str, Tensor]:
    """Return the new y and z of a deep recursion, and every gradient, by name.

    Args:
        net: The network. Its gradients are cleared first.
        norm: The ``output_norm`` or None. Its gradient is cleared afterwards.
        inputs: x, y and z [B, L, D].
        directions: Gradients of the new y and z.
        **options: Options of the recursion, including n and T.
    """
    from trm_kernels.recursion import deep_recursion

    net.zero_grad()
    leaves = [state.detach().clone().requires_grad_() for state in inputs]
    out = deep_recursion(net, *leaves, output_norm=norm, **options)  # type: ignore[arg-type]
    torch.autograd.backward(out, [d.to(o.dtype) for d, o in zip(directions, out, strict=True)])
    results = dict(zip(("new y", "new z"), (o.detach() for o in out), strict=True))
    results |= {name: leaf.grad for name, leaf in zip("xyz", leaves, strict=True) if leaf.grad is not None}
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, f"{name} received no gradient"
        results[name] = parameter.grad.clone()
    if norm is not None:
        weight: Any = norm.weight
        results["output norm"] = weight.grad.clone()
        norm.zero_grad()
    return results
