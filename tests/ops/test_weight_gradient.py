"""Weight gradients over steps and rows, and the gradient of the second GEMM of an MLP with its activation."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.common import DTYPES, FLOAT64, launched
from trm_kernels.ops._launch import Target
from trm_kernels.ops.activation_gradient import activation_gradient
from trm_kernels.ops.dispatch import chosen_by
from trm_kernels.ops.tiles import Activation, Choice, Problem, heuristic
from trm_kernels.ops.weight_gradient import ColumnSum, WeightGradient
from trm_kernels.testing import UNIT_ROUNDOFF, relative_error

pytestmark = pytest.mark.interpreter


def close(ours: Tensor, truth: Tensor, dtype: torch.dtype, factor: float = 8.0) -> None:
    assert relative_error(ours, truth) <= factor * UNIT_ROUNDOFF[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_launches_add_up(splits: int, transposed: bool, dtype: torch.dtype, device: str) -> None:
    """Numbers of rows that no tile divides, more splits than blocks, and launches of several sizes."""

    def chooser(problem: Problem, target: Target) -> Choice:
        return Choice("triton", heuristic(problem, target).tile, splits)

    total = WeightGradient()
    expected = torch.zeros(70, 5, dtype=torch.float64, device=device)
    with chosen_by(chooser), launched("weight_gradient_kernel"):
        for steps in (3, 1):
            g, a = torch.randn(steps, 70, 66, device=device), torch.randn(steps, 5, 66, device=device)
            g, a = g.to(dtype), a.to(dtype)
            if not transposed:
                g, a = g.mT.contiguous(), a.mT.contiguous()
            total.add(g, a, transposed=transposed)
            product = "snr,skr->nk" if transposed else "srn,srk->nk"
            expected += torch.einsum(product, g.double(), a.double())
    assert total.total.dtype == torch.float32
    close(total.total, expected, torch.float32)


@pytest.mark.parametrize("valid", [0, 1, 64, 65, 130])
def test_rows_beyond_the_count_add_nothing(valid: int, device: str) -> None:
    count = torch.tensor([valid], dtype=torch.int32, device=device)
    g, a = torch.randn(2, 130, 7, device=device), torch.randn(2, 130, 5, device=device)
    g[:, valid:] = a[:, valid:] = float("nan")
    weight, bias = WeightGradient(count), ColumnSum(count)
    for _ in range(2):
        weight.add(g, a)
        bias.add(g)
    rows_g, rows_a = g[:, :valid].double(), a[:, :valid].double()
    expected = 2 * torch.einsum("srn,srk->nk", rows_g, rows_a)
    torch.testing.assert_close(weight.total.double(), expected, rtol=0.0, atol=1e-4)
    torch.testing.assert_close(bias.total.double(), 2 * rows_g.sum((0, 1)), rtol=0.0, atol=1e-4)


def test_a_column_sum_over_launches(device: str) -> None:
    total = ColumnSum()
    g = torch.randn(3, 300, 70, device=device)
    total.add(g[:2])
    total.add(g[2:])
    torch.testing.assert_close(total.total, g.sum((0, 1)), rtol=1e-5, atol=1e-4)
    other = ColumnSum()
    other.add_total(torch.ones(4))
    other.add_total(torch.ones(4))
    assert other.total.tolist() == [2.0] * 4


@pytest.mark.skipif(FLOAT64 is None, reason="kernels run in float64 only in the interpreter")
@pytest.mark.parametrize(
    ("activation", "transposed", "packed"),
    [
        (Activation.GELU, False, True),
        (Activation.SWIGLU, False, True),
        (Activation.GELU, True, False),
        (Activation.SWIGLU, True, False),
    ],
)
def test_the_activation_gradient_is_that_of_autograd(
    activation: Activation, transposed: bool, packed: bool
) -> None:
    """G, the recomputed activation, the row dots of the folded norm, and the bias, over several tiles."""
    rows, inner, width, eps = 70, 66, 12, 1e-6
    gated = activation == Activation.SWIGLU
    h = torch.randn(rows, width, dtype=torch.float64)
    first = torch.randn(inner * (2 if gated else 1), width, dtype=torch.float64)
    second = torch.randn(width, inner, dtype=torch.float64)
    bias = None if gated else torch.randn(inner, dtype=torch.float64, requires_grad=True)
    normed = not transposed
    rms = (h.square().mean(1, keepdim=True) + eps).sqrt() if normed else torch.ones(rows, 1)
    pre = (h / rms @ first.t()).requires_grad_()
    act = F.silu(pre[:, :inner]) * pre[:, inner:] if gated else F.gelu(pre + bias)
    valid = 65 if packed else rows
    grad = torch.randn(rows, width, dtype=torch.float64)
    wanted = (act @ second.t())[:valid]
    leaves = [pre] if bias is None else [pre, bias]
    expected = torch.autograd.grad(wanted, leaves, grad[:valid])

    def shaped(matrix: Tensor) -> Tensor:
        return matrix.detach().t().contiguous()[None] if transposed else matrix.detach()[None].clone()

    sums = h.square().view(rows, 3, 4).sum(2)  # partial sums, as written by another kernel's tiles
    given_grad, given_pre = shaped(grad), shaped(pre)
    if packed:
        given_grad[:, valid:] = given_pre[:, valid:] = float("nan")
        sums[valid:] = float("nan")
    with launched("activation_gradient_kernel"):
        found = activation_gradient(
            given_grad,
            second.t().contiguous().t(),
            given_pre,
            activation=activation,
            bias=None if bias is None else bias.detach(),
            sumsq=sums if normed else None,
            eps=eps,
            count=torch.tensor([valid], dtype=torch.int32) if packed else None,
            transposed=transposed,
        )

    def rows_of(tensor: Tensor) -> Tensor:
        return (tensor[0].t() if transposed else tensor[0])[:valid]

    torch.testing.assert_close(rows_of(found.g), expected[0][:valid] / rms[:valid])
    torch.testing.assert_close(rows_of(found.act), act.detach()[:valid])
    if normed:
        assert found.dots is not None and found.dots.shape[1] == 2
        dots = (expected[0] * pre.detach()).sum(1)
        torch.testing.assert_close(found.dots[:valid].sum(1), dots[:valid])
    if bias is not None:
        torch.testing.assert_close(found.bias, expected[1])


def test_no_partial_sum_is_left_unwritten(device: str) -> None:
    """Splits without blocks must store zeros."""
    g, a = torch.ones(1, 3, 4, device=device), torch.ones(1, 3, 4, device=device)

    def chooser(problem: Problem, target: Target) -> Choice:
        return Choice("triton", heuristic(problem, target).tile, 8)

    with chosen_by(chooser):
        for _ in itertools.repeat(None, 2):
            gradient = WeightGradient()
            gradient.add(g, a)
            assert torch.equal(gradient.total, torch.full((4, 4), 3.0, device=device))
