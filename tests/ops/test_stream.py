"""The input of a network call: sums, a norm before them, copies and row sums, packed rows."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tests.ops.common import launched
from trm_kernels import reference
from trm_kernels.ops.gemm import Outputs, sumsq_parts
from trm_kernels.ops.stream import Norm, start

pytestmark = pytest.mark.interpreter
ROWS, WIDTH = 9, 40


def case(device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(1, ROWS, WIDTH, device=device, dtype=dtype) for _ in range(3)]


@pytest.mark.parametrize(("with_x", "weighted", "norm"), list(itertools.product((False, True), repeat=3)))
def test_sum_norm_and_row_sums(with_x: bool, weighted: bool, norm: bool, device: str) -> None:
    x, y, z = case(device)
    weight = 1.0 + torch.randn(WIDTH, device=device) if weighted else None
    with launched("stream_kernel"):
        stream, pair, normed = start(
            x if with_x else None,
            y,
            z,
            norm=Norm(weight, 1e-5) if norm else None,
            outputs=Outputs(write_sumsq=True),
            write_normed=norm,
        )
    v = reference.rms_norm(z, 1e-5) * (1.0 if weight is None else weight) if norm else z
    assert stream is not None and stream.sumsq is not None
    torch.testing.assert_close(stream.value, (x + y if with_x else y) + v)
    assert stream.sumsq.shape == (ROWS, sumsq_parts(WIDTH)) == (ROWS, 2)
    torch.testing.assert_close(stream.sumsq.sum(1), stream.value.square().sum(-1)[0])
    assert (pair is not None) == with_x and (normed is not None) == norm
    if pair is not None:
        assert torch.equal(pair, x + y)
    if normed is not None:
        torch.testing.assert_close(normed, v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_row_sums_are_those_of_stored_values(dtype: torch.dtype, device: str) -> None:
    """In half precision the sum is rounded, and the norm that reads it must use the rounded values."""
    x, y, z = case(device, dtype)
    stream, pair, _ = start(x, y, z, outputs=Outputs(write_sumsq=True))
    assert stream is not None and stream.sumsq is not None and pair is not None
    torch.testing.assert_close(
        stream.sumsq.sum(1), stream.value.float().square().sum(-1)[0], rtol=1e-6, atol=0
    )
    assert torch.equal(stream.value, (pair.float() + z.float()).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_copy_for_operands_is_rounded_once(dtype: torch.dtype, device: str) -> None:
    x, y, z = case(device)
    place = torch.full((1, ROWS, WIDTH), float("nan"), dtype=dtype, device=device)
    stream, _, _ = start(x, y, z, outputs=Outputs(copy_dtype=dtype, copy=place))
    assert stream is not None and stream.copy is place and stream.operand is place
    assert torch.equal(place, stream.value.to(dtype))


def test_the_answer_writes_no_next_input(device: str) -> None:
    _, _, z = case(device)
    stream, pair, normed = start(None, None, z, norm=Norm(None, 1e-5), write_normed=True, write_next=False)
    assert stream is None and pair is None and normed is not None
    torch.testing.assert_close(normed, reference.rms_norm(z, 1e-5))


def test_rows_beyond_the_count_are_neither_read_nor_written(device: str) -> None:
    x, y, z = case(device)
    count = torch.tensor([5], dtype=torch.int32, device=device)
    place = torch.full_like(x, 7.0)
    for state in (x, y, z):
        state[:, 5:] = float("nan")
    stream, _, _ = start(x, y, z, count=count, outputs=Outputs(next=place))
    assert stream is not None and stream.value is place
    assert torch.equal(place[:, :5], (x + y + z)[:, :5]) and place[:, 5:].eq(7.0).all()
