"""Attention against the reference: head sizes, masks, RoPE, dropout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.common import DTYPES, FLOAT64, check_rule, launched
from trm_kernels import reference
from trm_kernels.ops.attention import attention_forward, dropout_keep
from trm_kernels.ops.attention_backward import attention_backward
from trm_kernels.ops.attention_common import Dropout, Heads, Samples, mask_ends
from trm_kernels.ops.attention_op import attention
from trm_kernels.packing import Packing

pytestmark = pytest.mark.interpreter
KERNELS = (
    "attention_kernel",
    "attention_delta_kernel",
    "attention_backward_kv_kernel",
    "attention_backward_q_kernel",
)


class Case:
    """One attention problem for both the kernels and the reference."""

    def __init__(
        self,
        batch: int,
        length: int,
        heads: int,
        head_size: int,
        device: str,
        mask: Tensor | None = None,
        rotary: bool = False,
        dropout: float = 0.0,
    ) -> None:
        self.shape = batch, length, 3, heads, head_size
        self.device, self.mask, self.rotary = device, mask, rotary
        seed = torch.tensor([0x1234_5678_9ABC], device=device) if dropout else None
        self.dropout = Dropout(dropout, seed)

    def tables(self, qkv: Tensor) -> tuple[Tensor, Tensor] | None:
        return reference.rotary_tables(self.shape[1], self.shape[4], 1e4, qkv) if self.rotary else None

    def make(self) -> dict[str, Tensor]:
        batch, length, _, heads, head_size = self.shape
        shape = batch, length, 3 * heads * head_size
        return {"qkv": torch.randn(shape, dtype=torch.float64, device=self.device)}

    def ours(self, qkv: Tensor) -> Tensor:
        cos, sin = self.tables(qkv) or (None, None)
        mask = None if self.mask is None else self.mask.to(torch.uint8)
        return attention(qkv, self.shape[3], mask, cos, sin, self.dropout.probability, self.dropout.seed)

    def eager(self, qkv: Tensor) -> Tensor:
        batch, length, _, heads, _ = self.shape
        q, k, v = qkv.view(self.shape).permute(2, 0, 3, 1, 4)
        tables = self.tables(qkv)
        if tables is not None:
            q, k = reference.apply_rotary(q, tables), reference.apply_rotary(k, tables)
        keep = dropout_keep(self.dropout, batch, heads, length) if self.dropout.seed is not None else None
        out = reference.attention(q, k, v, self.mask, self.dropout.probability, keep)
        out = out.transpose(1, 2).reshape(batch, length, -1)
        return out if self.mask is None else out.masked_fill(~self.mask[..., None], 0.0)


def ragged(batch: int, length: int, device: str) -> Tensor:
    """Return a mask with a gap, a row of padding between valid ends, and a row without valid positions."""
    mask = torch.rand(batch, length, device=device) > 0.4
    mask[0] = False
    mask[-1] = True
    mask[-1, length // 2 : length - 1] = False
    return mask


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [8, 12, 16, 24, 32, 64, 80, 128, 256])
def test_every_head_size(head_size: int, dtype: torch.dtype, device: str) -> None:
    case = Case(1, 17, 2, head_size, device, rotary=True)
    with launched(*KERNELS):
        check_rule(case.ours, case.eager, case.make, dtype, seeds=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 2, 31, 64, 97])
@pytest.mark.parametrize("masked", [False, True])
def test_lengths_and_masks(length: int, masked: bool, dtype: torch.dtype, device: str) -> None:
    mask = ragged(3, length, device) if masked else None
    case = Case(3, length, 2, 16, device, mask=mask)
    check_rule(case.ours, case.eager, case.make, dtype, seeds=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_tiles_with_everything(dtype: torch.dtype, device: str) -> None:
    case = Case(2, 150, 1, 24, device, mask=ragged(2, 150, device), rotary=True, dropout=0.2)
    check_rule(case.ours, case.eager, case.make, dtype, seeds=2)


def test_masked_rows_are_zero_and_finite(device: str) -> None:
    mask = ragged(3, 20, device)
    case = Case(3, 20, 2, 8, device, mask=mask)
    qkv = torch.randn(3, 20, 48, device=device, requires_grad=True)
    out = case.ours(qkv)
    out.square().sum().backward()
    assert out[~mask].eq(0).all()
    assert qkv.grad.isfinite().all()
    assert qkv.grad[0].eq(0).all(), "a sample without valid positions must not receive a gradient"


def test_dropout_keeps_the_expected_fraction_and_follows_the_seed(device: str) -> None:
    keep = dropout_keep(Dropout(0.3, torch.tensor([1], device=device)), 2, 4, 64)
    other = dropout_keep(Dropout(0.3, torch.tensor([2], device=device)), 2, 4, 64)
    assert abs(keep.float().mean().item() - 0.7) < 0.01  # 32768 draws: 4 standard deviations
    assert 0.55 < (keep == other).float().mean().item() < 0.61  # independent: 0.7^2 + 0.3^2 = 0.58
    assert not torch.equal(keep[0, 0], keep[0, 1]) and not torch.equal(keep[0, 0], keep[1, 0])


def test_two_runs_are_bitwise_equal(device: str) -> None:
    case = Case(2, 70, 2, 16, device, mask=ragged(2, 70, device), dropout=0.1)
    qkv = torch.randn(2, 70, 96, device=device)

    def run() -> tuple[Tensor, Tensor]:
        leaf = qkv.clone().requires_grad_()
        out = case.ours(leaf)
        out.sum().backward()
        return out, leaf.grad

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@settings(max_examples=10)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 70),
    heads=st.integers(1, 3),
    half=st.integers(1, 20),
    data=st.data(),
)
def test_any_shape_and_mask(batch: int, length: int, heads: int, half: int, data: st.DataObject) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = st.lists(st.booleans(), min_size=length, max_size=length)
    mask = torch.tensor(data.draw(st.lists(rows, min_size=batch, max_size=batch)), device=device)
    case = Case(batch, length, heads, 2 * half, device, mask=mask, rotary=data.draw(st.booleans()))
    qkv = torch.randn(batch, length, 6 * heads * half, device=device)
    torch.testing.assert_close(case.ours(qkv), case.eager(qkv.double()).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(FLOAT64 is None, reason="kernels run in float64 only in the interpreter")
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_formula_passes_gradcheck(dropout: float) -> None:
    mask = torch.tensor([[True, False, True], [True, True, True]])
    case = Case(2, 3, 2, 4, "cpu", mask=mask, rotary=True, dropout=dropout)
    qkv = torch.randn(2, 3, 24, dtype=FLOAT64, requires_grad=True)
    assert torch.autograd.gradcheck(case.ours, (qkv,), fast_mode=True)


@pytest.mark.parametrize("everything", [False, True])
def test_opcheck(everything: bool, device: str) -> None:
    qkv = torch.randn(2, 5, 48, device=device, requires_grad=True)
    rest = (None, None, None, 0.0, None)
    if everything:
        cos, sin = reference.rotary_tables(5, 8, 1e4, qkv)
        mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]], dtype=torch.uint8, device=device)
        rest = (mask, cos, sin, 0.2, torch.tensor([7], device=device))
    torch.library.opcheck(attention, (qkv, 2, *rest))


def test_any_gradient_at_masked_rows_is_ignored(device: str) -> None:
    mask = torch.tensor([[True, False, True, False]], device=device)
    case = Case(1, 4, 2, 8, device, mask=mask)
    qkv = torch.randn(1, 4, 48, device=device)
    grad = torch.randn(1, 4, 16, device=device)

    def run(at_masked: float) -> Tensor:
        leaf = qkv.clone().requires_grad_()
        case.ours(leaf).backward(grad.masked_fill(~mask[..., None], at_masked))
        assert leaf.grad is not None
        return leaf.grad

    assert torch.equal(run(float("nan")), run(0.0))


def test_mismatched_arguments_are_rejected(device: str) -> None:
    qkv = torch.randn(2, 5, 48, device=device)
    mask = torch.ones(2, 5, dtype=torch.uint8, device=device)
    table = torch.ones(5, 4, device=device)
    for n_heads, bad_mask, cos, sin, dropout, word in (
        (5, None, None, None, 0.0, "heads"),
        (2, mask[:, :4], None, None, 0.0, "mask"),
        (2, mask, table, None, 0.0, "RoPE"),
        (2, mask, table[:4], table[:4], 0.0, "RoPE"),
        (2, mask, None, None, 0.1, "seed"),
    ):
        with pytest.raises(ValueError, match=word):
            attention(qkv, n_heads, bad_mask, cos, sin, dropout, None)


def test_a_valid_key_at_the_start_of_the_last_tile_counts(device: str) -> None:
    mask = torch.zeros(1, 65, dtype=torch.bool, device=device)
    mask[0, 0] = mask[0, 64] = True
    assert mask_ends(mask.to(torch.uint8)).tolist() == [65]
    assert mask_ends(torch.zeros(1, 3, dtype=torch.uint8, device=device)).tolist() == [0]
    case = Case(1, 65, 1, 8, device, mask=mask)
    check_rule(case.ours, case.eager, case.make, torch.float32, seeds=1)


def test_samples_in_packed_rows_equal_padded_ones(device: str) -> None:
    """Lengths below and of one tile, and an empty sample, with unused rows at the end."""
    heads, head_size, length = 2, 8, 70
    mask = torch.zeros(4, length, dtype=torch.bool, device=device)
    for sample, valid in enumerate((3, 70, 0, 65)):
        mask[sample, torch.randperm(length, device=device)[:valid]] = True
    packing = Packing.of(mask)
    case = Case(4, length, heads, head_size, device, mask=mask)
    qkv, grad = (torch.randn(4, length, n * 16, device=device) for n in (3, 1))
    leaf = qkv.clone().requires_grad_()
    expected = case.eager(leaf)
    expected.backward(grad)
    rows = packing.pack(qkv).contiguous()
    rows[0, mask.sum() :] = float("nan")
    samples = Samples(4, length, starts=packing.starts, count=packing.count)
    with launched(*KERNELS):
        out, lse = attention_forward(rows, Heads(heads, samples))
        found = attention_backward(packing.pack(grad).contiguous(), rows, out, lse, Heads(heads, samples))
    torch.testing.assert_close(packing.unpack(out), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packing.unpack(found.qkv), leaf.grad, rtol=1e-4, atol=1e-5)


def test_packed_rows_are_rotated_by_their_position(device: str) -> None:
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 0, 1]], dtype=torch.bool, device=device)
    packing = Packing.of(mask)
    case = Case(2, 5, 2, 8, device, mask=mask, rotary=True)
    qkv, grad = (torch.randn(2, 5, n * 16, device=device) for n in (3, 1))
    leaf = qkv.clone().requires_grad_()
    expected = case.eager(leaf)
    expected.backward(grad)
    cos, sin = (table[packing.positions()] for table in case.tables(qkv) or ())
    heads = Heads(2, Samples(2, 5, starts=packing.starts, count=packing.count), cos, sin)
    rows = packing.pack(qkv).contiguous()
    out, lse = attention_forward(rows, heads)
    found = attention_backward(packing.pack(grad).contiguous(), rows, out, lse, heads)
    torch.testing.assert_close(packing.unpack(out), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packing.unpack(found.qkv), leaf.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(FLOAT64 is None, reason="kernels run in float64 only in the interpreter")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_bias_and_a_folded_norm(masked: bool, dropout: float) -> None:
    """Projections s Y without bias: output, gradient divided by RMS, row dots, and gradient of the bias."""
    eps, width = 1e-3, 16
    mask = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 0]], dtype=torch.bool) if masked else None
    case = Case(2, 4, 2, 8, "cpu", mask=mask, dropout=dropout)
    h = torch.randn(2, 4, width, dtype=torch.float64)
    rstd = (h.square().mean(-1, keepdim=True) + eps).rsqrt()
    weight = torch.randn(3 * width, width, dtype=torch.float64)
    pre = (rstd * (h @ weight.t())).requires_grad_()
    bias = torch.randn(3 * width, dtype=torch.float64, requires_grad=True)
    expected = case.eager(pre + bias)
    grad = torch.randn_like(expected)
    of_pre, of_bias = torch.autograd.grad(expected, (pre, bias), grad)

    key_mask = None if mask is None else mask.to(torch.uint8)
    samples = Samples(2, 4, key_mask, None if key_mask is None else mask_ends(key_mask))
    heads = Heads(2, samples, bias=bias.detach(), dropout=case.dropout)
    out, lse = attention_forward(pre.detach(), heads)
    torch.testing.assert_close(out, expected)
    sums = h.square().view(8, 4, 4).sum(2)
    found = attention_backward(grad, pre.detach(), out, lse, heads, sumsq=sums, eps=eps)
    torch.testing.assert_close(found.qkv, of_pre * rstd)
    assert found.dots is not None and found.bias is not None
    torch.testing.assert_close(found.dots.sum(1), (of_pre * pre.detach()).sum(-1).flatten())
    torch.testing.assert_close(found.bias, of_bias)


def test_calls_with_one_seed_draw_different_numbers(device: str) -> None:
    seed = torch.tensor([3], device=device)
    first, second, again = (dropout_keep(Dropout(0.5, seed, call), 1, 2, 64) for call in (0, 1, 0))
    assert torch.equal(first, again)
    assert 0.47 < (first == second).float().mean().item() < 0.53
