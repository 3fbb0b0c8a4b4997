"""Packed rows: packing, unpacking and their gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trm_kernels.packing import Packing, read_positions


@settings(max_examples=40)
@given(batch=st.integers(1, 4), length=st.integers(1, 7), spare=st.integers(0, 3), data=st.data())
def test_rows_hold_the_valid_positions_in_order(
    batch: int, length: int, spare: int, data: st.DataObject
) -> None:
    rows = st.lists(st.booleans(), min_size=length, max_size=length)
    mask = torch.tensor(data.draw(st.lists(rows, min_size=batch, max_size=batch)))
    valid = int(mask.sum())
    packing = Packing.of(mask, rows=max(1, valid + spare))
    x = torch.randn(batch, length, 3)
    packed = packing.pack(x)
    assert packed.shape == (1, max(1, valid + spare), 3)
    assert torch.equal(packed[0, :valid], x[mask])
    assert packing.count.tolist() == [valid]
    assert packing.starts.tolist() == [0, *mask.sum(1).cumsum(0).tolist()]
    assert packing.starts.dtype == packing.count.dtype == torch.int32
    assert torch.equal(packing.positions()[:valid], mask.nonzero()[:, 1])
    assert torch.equal(packing.unpack(packed), x.masked_fill(~mask[..., None], 0.0))


def test_unused_rows_have_no_effect() -> None:
    """Kernels do not write them, so NaN there must not reach the padded tensor or a gradient."""
    mask = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0]])
    packing = Packing.of(mask)
    packed = packing.pack(torch.randn(3, 3, 2)).clone()
    packed[0, 3:] = float("nan")
    assert packing.unpack(packed).isfinite().all()
    x = torch.randn(3, 3, 2, requires_grad=True)
    grad = torch.ones(1, 9, 2)
    grad[0, 3:] = float("nan")
    packing.pack(x).backward(grad)
    assert x.grad is not None and torch.equal(x.grad, mask[..., None].expand(3, 3, 2).float())


def test_gradients_of_packing_and_unpacking() -> None:
    packing = Packing.of(torch.tensor([[1, 0, 1], [1, 1, 1]]))
    x = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: packing.unpack(packing.pack(x).sin()), (x,))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_a_mask_of_any_dtype(dtype: torch.dtype) -> None:
    mask = torch.tensor([[1, 1, 0], [0, 1, 0]])
    assert torch.equal(Packing.of(mask.to(dtype)).index, Packing.of(mask).index)


def test_positions_that_are_read() -> None:
    x = torch.arange(12.0).view(2, 3, 2)
    assert read_positions(x, torch.tensor([[2], [0]])).tolist() == [[[4.0, 5.0]], [[6.0, 7.0]]]
