"""add3 + RMSNorm against the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.common import DTYPES, FLOAT64, check_rule, launched
from trm_kernels import reference
from trm_kernels.ops.norm import add3_rms_norm, add_rms_norm, rms_norm_backward

pytestmark = pytest.mark.interpreter
EPS = 1e-5


def ours(x: Tensor, y: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    return torch.cat(add3_rms_norm(x, y, z, weight, EPS), dim=-1)


def eager(x: Tensor, y: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    h = x + y + z
    return torch.cat((h, F.rms_norm(h, weight.shape, weight, EPS)), dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 31, 64), (3, 97, 48), (1, 5, 2048)])
def test_add3_rms_norm_meets_the_rule(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    def make() -> dict[str, Tensor]:
        case = {name: torch.randn(shape, dtype=torch.float64, device=device) for name in "xyz"}
        return case | {"weight": torch.rand(shape[-1], dtype=torch.float64, device=device) + 0.5}

    with launched("add_rms_norm_kernel", "rms_norm_backward_kernel"):
        check_rule(ours, eager, make, dtype)


@settings(max_examples=15)
@given(
    batch=st.integers(1, 4),
    length=st.integers(1, 70),
    width=st.integers(1, 130),
    axis=st.sampled_from([-1, 1]),
)
def test_any_shape_and_axis(batch: int, length: int, width: int, axis: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    h = torch.randn(batch, length, width, device=device)
    grad = torch.randn_like(h)
    _, out, _ = add_rms_norm(h, eps=EPS, axis=axis)
    grad_h, _, _ = rms_norm_backward(grad, h, None, None, eps=EPS, axis=axis)
    leaf = h.double().requires_grad_()
    truth = reference.rms_norm(leaf, EPS, dim=axis)
    truth.backward(grad.double())
    torch.testing.assert_close(out, truth.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_h, leaf.grad.float(), rtol=1e-4, atol=1e-4)


def test_every_element_is_written(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    poison_allocations(monkeypatch)
    h = torch.randn(2, 33, 40, device=device)
    total, out, sumsq = add_rms_norm(h, h, None, eps=EPS, write_sum=True, write_sumsq=True)
    for tensor in (total, out, sumsq):
        assert tensor is not None and not tensor.isnan().any()


def poison_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch.empty_like and torch.empty return NaN, so that unwritten elements show."""
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)

        def poisoned(*args: object, original=original, **kwargs: object) -> Tensor:
            tensor = original(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(torch, name, poisoned)


@pytest.mark.skipif(FLOAT64 is None, reason="kernels run in float64 only in the interpreter")
def test_formula_passes_gradcheck() -> None:
    x, y, z = (torch.randn(2, 3, 8, dtype=FLOAT64, requires_grad=True) for _ in range(3))
    weight = torch.rand(8, dtype=FLOAT64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: add3_rms_norm(*a, EPS), (x, y, z, weight), fast_mode=True)
    assert torch.autograd.gradcheck(lambda a: add3_rms_norm(a, None, None, None, EPS), (x,), fast_mode=True)


@pytest.mark.parametrize("given_tensors", [(True, True, True), (False, True, False), (False, False, False)])
def test_opcheck(given_tensors: tuple[bool, ...], device: str) -> None:
    x = torch.randn(2, 5, 16, device=device, requires_grad=True)
    addends = [
        torch.randn(2, 5, 16, device=device, requires_grad=True) if given else None
        for given in given_tensors[:2]
    ]
    weight = torch.rand(16, device=device, requires_grad=True) if given_tensors[2] else None
    torch.library.opcheck(add3_rms_norm, (x, *addends, weight, EPS))


def test_mismatched_addends_are_rejected(device: str) -> None:
    x = torch.randn(2, 5, 16, device=device)
    with pytest.raises(ValueError, match="addends"):
        add3_rms_norm(x, x[:1], None, None, EPS)
    with pytest.raises(ValueError, match="weight"):
        add3_rms_norm(x, None, None, torch.ones(15, device=device), EPS)
