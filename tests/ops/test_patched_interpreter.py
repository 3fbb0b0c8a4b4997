"""Operations that Triton's interpreter computes incorrectly without ``tests/patched_interpreter.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trm_kernels import ops

pytestmark = pytest.mark.interpreter
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
in_interpreter = pytest.mark.skipif(not ops.INTERPRET, reason="only the interpreter rejects these")

#: All cases of rounding a significand: exact, below half, half to even in both directions, above half, with a
#: carry into the exponent; then subnormals, both zeros, the largest numbers, infinity, and both kinds of NaN.
PATTERNS = [
    0x3F800000, 0x3F807FFF, 0x3F808000, 0x3F808001, 0x3F818000, 0x3F817FFF, 0x3FFF8000, 0x3FFF7FFF,
    0x3FFFFFFF, 0x00000000, 0x00000001, 0x00007FFF, 0x00008000, 0x00008001, 0x00018000, 0x007F7FFF,
    0x007F8000, 0x007FFFFF, 0x7F7F0000, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0x7F800000, 0x7F800001,
    0x7FC00000, 0x7FFFFFFF,
]  # fmt: skip


def run(kernel: Any, out: Tensor, *inputs: Tensor) -> Tensor:
    kernel[(triton.cdiv(out.numel(), 1024),)](out, *inputs, out.numel(), BLOCK=1024)
    return out


@triton.jit
def copy_kernel(out_ptr, x_ptr, count, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place, mask=place < count, other=1.0)
    tl.store(out_ptr + place, x.to(out_ptr.dtype.element_ty), mask=place < count)


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """Whether the bits are equal; all NaNs count as equal."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[found.element_size()]
    nan = expected.isnan()
    return torch.equal(found.isnan(), nan) and torch.equal(
        found.view(integer)[~nan], expected.view(integer)[~nan]
    )


def all_bfloat16(device: str) -> Tensor:
    return torch.arange(2**16, device=device).to(torch.int16).view(torch.bfloat16)


def interesting_float32(device: str) -> Tensor:
    """Return each pattern with both signs, and random patterns: all exponents, including NaN and infinity."""
    chosen = torch.tensor(PATTERNS, dtype=torch.int64)
    chosen = torch.cat((chosen, chosen + 2**31, torch.randint(2**32, (2**18,))))
    return chosen.to(torch.int32).view(torch.float32).to(device)


def test_the_patch_is_applied() -> None:
    assert ops.INTERPRETS_BFLOAT16 == ops.INTERPRET, (
        "Triton's internals have changed: tests/patched_interpreter.py"
    )


def test_loads_and_stores_keep_every_pattern(device: str) -> None:
    x = all_bfloat16(device)
    assert torch.equal(run(copy_kernel, torch.zeros_like(x), x).view(torch.int16), x.view(torch.int16))


def test_float32_is_rounded_to_nearest_even(device: str) -> None:
    x = interesting_float32(device)
    found = run(copy_kernel, torch.empty_like(x, dtype=torch.bfloat16), x)
    assert same_bits(found, x.to(torch.bfloat16))
    some = found[: len(PATTERNS)].view(torch.int16).tolist()
    assert some[:9] == [0x3F80, 0x3F80, 0x3F80, 0x3F81, 0x3F82, 0x3F81, 0x4000, 0x3FFF, 0x4000]
    assert some[9:18] == [0, 0, 0, 0, 1, 2, 0x7F, 0x80, 0x80]
    assert some[18:23] == [0x7F7F, 0x7F7F, 0x7F80, 0x7F80, 0x7F80] and found[23:26].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32, torch.int64])
def test_other_dtypes_are_rounded_to_bfloat16(dtype: torch.dtype, device: str) -> None:
    x = (torch.randn(2000, dtype=torch.float64) * 100.0).to(device, dtype)
    found = run(copy_kernel, torch.empty_like(x, dtype=torch.bfloat16), x)
    assert same_bits(found, x.to(torch.bfloat16))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy warns of signalling NaN
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_bfloat16_becomes_another_dtype(dtype: torch.dtype, device: str) -> None:
    x = all_bfloat16(device)
    if dtype == torch.float16:
        x = x[x.float().abs() <= 65504.0]
    found = run(copy_kernel, torch.empty_like(x, dtype=dtype), x)
    assert same_bits(found, x.to(dtype))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_bfloat16_becomes_an_integer(dtype: torch.dtype, device: str) -> None:
    x = torch.randint(128, (300,), device=device).to(torch.bfloat16) + 0.5
    assert torch.equal(run(copy_kernel, torch.empty_like(x, dtype=dtype), x), x.to(dtype))


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="fp8 needs sm_90"
)
def test_float32_is_rounded_to_e4m3(device: str) -> None:
    """Kernels divide by the largest value first, so no value exceeds 448."""
    x = torch.cat(
        (torch.tensor([124.01, 17.0, 19.0, 448.0, 2.0**-10]), 448.0 * (2.0 * torch.rand(10**5) - 1.0))
    )
    x = torch.cat((x, torch.randn(10**5) * 2.0**-8)).to(device)
    found = run(copy_kernel, torch.empty_like(x, dtype=torch.float8_e4m3fn), x)
    assert same_bits(found, x.to(torch.float8_e4m3fn))
    assert found[:5].tolist() == [128.0, 16.0, 20.0, 448.0, 0.0]


@triton.jit
def elementwise_kernel(out_ptr, x_ptr, y_ptr, count, BLOCK: tl.constexpr, OP: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place, mask=place < count, other=0.0)
    y = tl.load(y_ptr + place, mask=place < count, other=0.0)
    if OP == "add":
        z = x + y
    elif OP == "subtract":
        z = x - y
    elif OP == "multiply":
        z = x * y
    elif OP == "negate":
        z = -x
    elif OP == "absolute":
        z = tl.abs(x)
    elif OP == "maximum":
        z = tl.maximum(x, y).to(x.dtype)
    elif OP == "a number":
        z = x * 0.3
    elif OP == "fma":
        z = tl.fma(x, y, x)
    elif OP == "where":
        z = tl.where(x < y, x, y)
    elif OP == "where zero":
        z = tl.where((x > y) & (y > 0.0), x, 0.0)
    elif OP == "compare":
        z = (x >= y).to(tl.float32)
    else:
        z = tl.full((BLOCK,), 1.1, dtype=tl.bfloat16) + tl.zeros((BLOCK,), dtype=tl.bfloat16)
    tl.store(out_ptr + place, z.to(out_ptr.dtype.element_ty), mask=place < count)


#: In bfloat16 if PyTorch's op also rounds once; else in float32, and rounded here.
ELEMENTWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "subtract": torch.sub,
    "multiply": torch.mul,
    "negate": lambda x, y: -x,
    "absolute": lambda x, y: x.abs(),
    "maximum": torch.maximum,
    "a number": lambda x, y: (x.float() * torch.tensor(0.3).bfloat16().item()).bfloat16(),
    "fma": lambda x, y: (x.float() * y.float() + x.float()).bfloat16(),
    "where": torch.minimum,
    "where zero": lambda x, y: torch.where((x > y) & (y > 0), x, 0.0),
    "compare": lambda x, y: (x >= y).bfloat16(),
    "full": lambda x, y: torch.full_like(x, 1.1),
}


@pytest.mark.parametrize("op", ELEMENTWISE)
def test_arithmetic_is_in_float32_and_rounded_once(op: str, device: str) -> None:
    x, y = (torch.randn(3000, device=device).to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(x)
    elementwise_kernel[(3,)](out, x, y, out.numel(), BLOCK=1024, OP=op)
    assert same_bits(out, ELEMENTWISE[op](x, y))


@triton.jit
def dot_kernel(out_ptr, a_ptr, b_ptr, SIZE: tl.constexpr, TRANSPOSED: tl.constexpr):
    m, n = tl.arange(0, SIZE), tl.arange(0, SIZE)
    place = m[:, None] * SIZE + n[None, :]
    a, b = tl.load(a_ptr + place), tl.load(b_ptr + place)
    acc = tl.full((SIZE, SIZE), 0.5, dtype=tl.float32)
    acc = tl.dot(tl.trans(a), b, acc) if TRANSPOSED else tl.dot(a, b, acc)
    tl.store(out_ptr + place, acc)


@pytest.mark.parametrize("transposed", [False, True])
def test_dot_multiplies_the_widened_operands(transposed: bool, device: str) -> None:
    a, b = (torch.randn(64, 64, device=device).to(torch.bfloat16) for _ in range(2))
    out = torch.empty(64, 64, device=device)
    dot_kernel[(1,)](out, a, b, SIZE=64, TRANSPOSED=transposed)
    left = a.double().mT if transposed else a.double()
    torch.testing.assert_close(out.double(), left @ b.double() + 0.5, rtol=1e-6, atol=1e-5)


@triton.jit
def reduction_kernel(out_ptr, x_ptr, SIZE: tl.constexpr, OP: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, SIZE))
    if OP == "max":
        out = tl.max(x, axis=0)
    elif OP == "min":
        out = tl.min(x, axis=0)
    elif OP == "widened sum":
        out = tl.sum(x.to(tl.float32), axis=0)
    else:
        out = tl.sum(x, axis=0)
    tl.store(out_ptr, out.to(tl.float32))


@pytest.mark.parametrize("op", ["max", "min", "widened sum"])
def test_reductions(op: str, device: str) -> None:
    x = torch.randn(256, device=device).to(torch.bfloat16)
    out = torch.empty(1, device=device)
    reduction_kernel[(1,)](out, x, SIZE=256, OP=op)
    expected = {"max": x.max(), "min": x.min(), "widened sum": x.double().sum()}[op]
    torch.testing.assert_close(
        out[0].double(), expected.double(), rtol=0.0, atol=0.0 if op != "widened sum" else 1e-5
    )


@triton.jit
def atomic_kernel(out_ptr, x_ptr):
    tl.atomic_add(out_ptr, tl.load(x_ptr))


@in_interpreter
def test_sums_that_round_at_every_step_are_refused() -> None:
    x, out = torch.ones(256, dtype=torch.bfloat16), torch.zeros(1)
    with pytest.raises(Exception, match="reduction in bfloat16"):
        reduction_kernel[(1,)](out, x, SIZE=256, OP="sum")
    with pytest.raises(Exception, match="reduction in bfloat16"):
        atomic_kernel[(1,)](torch.zeros(1, dtype=torch.bfloat16), x)
