"""Softmax attention over packed projections [B, L, 3, H, E]: key masks, RoPE, dropout, any head size.

Forward and backward never hold a score matrix (FlashAttention-2, arXiv 2307.08691). The backward runs as
two kernels, one over key blocks and one over query blocks, so that nothing is accumulated by atomics.

- Mask [B, L]: padding is not attended to, and its own rows of the output are zeros, so a row of the batch
  without any valid position gives zeros and no NaN. Keys behind a sample's last valid position are skipped.
- RoPE (NeoX layout) is applied where queries and keys are loaded; their gradients are rotated back before
  they are stored.
- Dropout: Philox keyed by a device seed, counted by (query, key, sample and head). The backward draws the
  same numbers again; no mask is stored, and a captured graph draws new ones when the seed changes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trm_kernels.ops._launch import (
    Target,
    accumulator,
    cdiv,
    input_precision,
    launch,
    power_of_two,
    target_of,
)
from trm_kernels.ops._library import define, first_order

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _program(L, H, BLOCK: tl.constexpr):
    """Tile of rows, sample-and-head, sample, and head; one grid axis, as the others end at 65535."""
    tiles = tl.cdiv(L, BLOCK)
    head = tl.program_id(0) // tiles
    return tl.program_id(0) % tiles, head, head // H, head % H


@triton.jit
def _load_head(
    p_head,
    rows,
    L,
    row_stride,
    cos_ptr,
    sin_ptr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ROTARY: tl.constexpr,
):
    """Rows of one head [BL, BE] in the dtype of storage, rotated if asked; zeros past L and past E."""
    e = tl.arange(0, BLOCK_E)
    valid = (rows < L)[:, None] & (e < E)[None, :]
    p_rows = p_head + rows.to(tl.int64)[:, None] * row_stride
    x = tl.load(p_rows + e[None, :], mask=valid, other=0.0)
    if ROTARY:
        HALF: tl.constexpr = E // 2
        partner = tl.where(e < HALF, e + HALF, e - HALF)
        x_partner = tl.load(p_rows + partner[None, :], mask=valid, other=0.0)
        cos, sin = _rotation(rows, L, cos_ptr, sin_ptr, E, BLOCK_E)
        x = (x.to(cos.dtype) * cos + x_partner.to(cos.dtype) * sin).to(x.dtype)
    return x


@triton.jit
def _rotation(rows, L, cos_ptr, sin_ptr, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Factors [BL, BE] of a channel and of its partner: x' = x cos + partner sin, with the sign in sin."""
    e = tl.arange(0, BLOCK_E)
    HALF: tl.constexpr = E // 2
    valid = (rows < L)[:, None] & (e < E)[None, :]
    table = rows.to(tl.int64)[:, None] * HALF + (e % HALF)[None, :]
    cos = tl.load(cos_ptr + table, mask=valid, other=0.0)
    sin = tl.load(sin_ptr + table, mask=valid, other=0.0)
    return cos, tl.where((e < HALF)[None, :], -sin, sin)


@triton.jit
def _rotate_back(grad, rows, L, cos_ptr, sin_ptr, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """The transposed rotation of an accumulated gradient [BL, BE]."""
    e = tl.arange(0, BLOCK_E)
    HALF: tl.constexpr = E // 2
    partner = tl.where(e < HALF, e + HALF, tl.where(e < E, e - HALF, e))
    grad_partner = tl.gather(grad, tl.broadcast_to(partner[None, :], grad.shape), axis=1)
    cos, sin = _rotation(rows, L, cos_ptr, sin_ptr, E, BLOCK_E)
    return grad * cos - grad_partner * sin


@triton.jit
def _kept(seed_ptr, rows, cols, head, threshold):
    """Which attention weights [BM, BN] survive dropout."""
    shape = rows[:, None] + cols[None, :]
    c0 = rows[:, None] + tl.zeros_like(shape)
    c1 = cols[None, :] + tl.zeros_like(shape)
    zero = tl.zeros_like(shape)
    bits, _, _, _ = tl.philox(tl.load(seed_ptr), c0, c1, zero + head, zero)
    return bits.to(tl.int64) >= threshold


@triton.jit
def attention_kernel(
    qkv_ptr,
    mask_ptr,
    end_ptr,
    cos_ptr,
    sin_ptr,
    seed_ptr,
    out_ptr,
    lse_ptr,
    L,
    H,
    scale,
    threshold,
    inv_keep,
    E: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ROTARY: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    tile, head, b, h = _program(L, H, BLOCK_M)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    e = tl.arange(0, BLOCK_E)
    row_stride = 3 * H * E
    p_q = qkv_ptr + b.to(tl.int64) * L * row_stride + h * E
    q = _load_head(p_q, m, L, row_stride, cos_ptr, sin_ptr, E, BLOCK_E, ROTARY)  # [BM, BE]

    end = L
    keep_row = m < L
    if HAS_MASK:
        # A tile behind the last valid position has nothing to attend for.
        end = tl.load(end_ptr + b)
        end = tl.where(tile * BLOCK_M < end, end, 0)
        keep_row = tl.load(mask_ptr + b.to(tl.int64) * L + m, mask=m < L, other=0) != 0
    highest = tl.full((BLOCK_M,), float("-inf"), dtype=ACC)
    total = tl.zeros((BLOCK_M,), dtype=ACC)
    acc = tl.zeros((BLOCK_M, BLOCK_E), dtype=ACC)
    for start in range(0, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)  # [BN]
        k = _load_head(p_q + H * E, n, L, row_stride, cos_ptr, sin_ptr, E, BLOCK_E, ROTARY)  # [BN, BE]
        v = _load_head(p_q + 2 * H * E, n, L, row_stride, cos_ptr, sin_ptr, E, BLOCK_E, False)
        valid = n < L
        if HAS_MASK:
            valid = tl.load(mask_ptr + b.to(tl.int64) * L + n, mask=valid, other=0) != 0
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC) * (scale * _LOG2E)
        scores = tl.where(valid[None, :], scores, float("-inf"))  # [BM, BN], in powers of two
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        # A row that met no valid key yet has -inf for a maximum, and -inf - -inf is NaN.
        shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(highest - shift)
        total = total * decay + tl.sum(weights, axis=1)
        if DROPOUT:
            weights = tl.where(_kept(seed_ptr, m, n, head, threshold), weights * inv_keep, 0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION, out_dtype=ACC)
        highest = new_highest

    safe = tl.where(total > 0.0, total, 1.0)
    out = tl.where(keep_row[:, None], acc / safe[:, None], 0.0)
    p_out = out_ptr + (b.to(tl.int64) * L + m)[:, None] * (H * E) + h * E + e[None, :]
    tl.store(p_out, out.to(out_ptr.dtype.element_ty), mask=(m < L)[:, None] & (e < E)[None, :])
    lse = tl.where(total > 0.0, highest + tl.log2(safe), 0.0)
    tl.store(lse_ptr + head.to(tl.int64) * L + m, lse, mask=m < L)


@triton.jit
def _weights_and_gradient(
    q, k, v, grad, lse, delta, valid, kept, scale, inv_keep,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Dropped attention weights and the gradient of the scores, both [BM, BN]."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC) * (scale * _LOG2E)
    weights = tl.where(valid, tl.exp2(scores - lse[:, None]), 0.0)
    grad_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)
    dropped = weights
    if DROPOUT:
        dropped = tl.where(kept, weights * inv_keep, 0.0)
        grad_weights = tl.where(kept, grad_weights * inv_keep, 0.0)
    return dropped, weights * (grad_weights - delta[:, None])


@triton.jit
def _load_query(
    qkv_ptr, grad_ptr, mask_ptr, cos_ptr, sin_ptr, lse_ptr, delta_ptr, m, b, h, L, H,
    E: tl.constexpr, BLOCK_E: tl.constexpr, HAS_MASK: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    """Query block [BM, BE] with its output gradient [BM, BE], log-sum-exp [BM] and delta [BM]."""
    e = tl.arange(0, BLOCK_E)
    sample = b.to(tl.int64) * L
    q = _load_head(
        qkv_ptr + sample * (3 * H * E) + h * E, m, L, 3 * H * E, cos_ptr, sin_ptr, E, BLOCK_E, ROTARY
    )
    counted = m < L
    if HAS_MASK:
        counted = tl.load(mask_ptr + sample + m, mask=counted, other=0) != 0
    p_grad = grad_ptr + (sample + m)[:, None] * (H * E) + h * E + e[None, :]
    grad = tl.load(p_grad, mask=counted[:, None] & (e < E)[None, :], other=0.0)
    rows = (b * H + h).to(tl.int64) * L + m
    lse = tl.load(lse_ptr + rows, mask=m < L, other=0.0)
    delta = tl.load(delta_ptr + rows, mask=counted, other=0.0)
    return q, grad, lse, delta


@triton.jit
def attention_delta_kernel(
    out_ptr,
    grad_ptr,
    delta_ptr,
    L,
    H,
    E: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """delta = sum over channels of output times its gradient [B, H, L]: the softmax backward's row term."""
    tile, head, b, h = _program(L, H, BLOCK_M)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    e = tl.arange(0, BLOCK_E)
    valid = (m < L)[:, None] & (e < E)[None, :]
    offsets = (b.to(tl.int64) * L + m)[:, None] * (H * E) + h * E + e[None, :]
    out = tl.load(out_ptr + offsets, mask=valid, other=0.0).to(ACC)
    grad = tl.load(grad_ptr + offsets, mask=valid, other=0.0).to(ACC)
    tl.store(delta_ptr + head.to(tl.int64) * L + m, tl.sum(out * grad, axis=1), mask=m < L)


@triton.jit
def attention_backward_kv_kernel(
    qkv_ptr,
    grad_ptr,
    mask_ptr,
    end_ptr,
    cos_ptr,
    sin_ptr,
    seed_ptr,
    lse_ptr,
    delta_ptr,
    grad_qkv_ptr,
    L,
    H,
    scale,
    threshold,
    inv_keep,
    E: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ROTARY: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    tile, head, b, h = _program(L, H, BLOCK_N)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    e = tl.arange(0, BLOCK_E)
    row_stride = 3 * H * E
    sample = b.to(tl.int64) * L
    p_k = qkv_ptr + sample * row_stride + H * E + h * E
    k = _load_head(p_k, n, L, row_stride, cos_ptr, sin_ptr, E, BLOCK_E, ROTARY)  # [BN, BE]
    v = _load_head(p_k + H * E, n, L, row_stride, cos_ptr, sin_ptr, E, BLOCK_E, False)

    end = L
    valid_n = n < L
    if HAS_MASK:
        end = tl.load(end_ptr + b)
        end = tl.where(tile * BLOCK_N < end, end, 0)
        valid_n = tl.load(mask_ptr + sample + n, mask=valid_n, other=0) != 0
    grad_k = tl.zeros((BLOCK_N, BLOCK_E), dtype=ACC)
    grad_v = tl.zeros((BLOCK_N, BLOCK_E), dtype=ACC)
    for start in range(0, end, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)  # [BM]
        q, grad, lse, delta = _load_query(
            qkv_ptr, grad_ptr, mask_ptr, cos_ptr, sin_ptr, lse_ptr, delta_ptr, m, b, h, L, H,
            E, BLOCK_E, HAS_MASK, ROTARY,
        )  # fmt: skip
        valid = (m < L)[:, None] & valid_n[None, :]
        kept = valid
        if DROPOUT:
            kept = _kept(seed_ptr, m, n, head, threshold)
        weights, grad_scores = _weights_and_gradient(
            q, k, v, grad, lse, delta, valid, kept, scale, inv_keep, DROPOUT, PRECISION, ACC
        )
        grad_v = tl.dot(
            tl.trans(weights.to(grad.dtype)), grad, grad_v, input_precision=PRECISION, out_dtype=ACC
        )
        grad_k = tl.dot(
            tl.trans(grad_scores.to(q.dtype)), q, grad_k, input_precision=PRECISION, out_dtype=ACC
        )

    grad_k *= scale
    if ROTARY:
        grad_k = _rotate_back(grad_k, n, L, cos_ptr, sin_ptr, E, BLOCK_E)
    p_grad = grad_qkv_ptr + (sample + n)[:, None] * row_stride + H * E + h * E + e[None, :]
    stored = (n < L)[:, None] & (e < E)[None, :]
    tl.store(p_grad, grad_k.to(grad_qkv_ptr.dtype.element_ty), mask=stored)
    tl.store(p_grad + H * E, grad_v.to(grad_qkv_ptr.dtype.element_ty), mask=stored)


@triton.jit
def attention_backward_q_kernel(
    qkv_ptr,
    grad_ptr,
    mask_ptr,
    end_ptr,
    cos_ptr,
    sin_ptr,
    seed_ptr,
    lse_ptr,
    delta_ptr,
    grad_qkv_ptr,
    L,
    H,
    scale,
    threshold,
    inv_keep,
    E: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ROTARY: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    tile, head, b, h = _program(L, H, BLOCK_M)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    e = tl.arange(0, BLOCK_E)
    row_stride = 3 * H * E
    sample = b.to(tl.int64) * L
    q, grad, lse, delta = _load_query(
        qkv_ptr, grad_ptr, mask_ptr, cos_ptr, sin_ptr, lse_ptr, delta_ptr, m, b, h, L, H,
        E, BLOCK_E, HAS_MASK, ROTARY,
    )  # fmt: skip
    p_k = qkv_ptr + sample * row_stride + H * E + h * E
    end = L
    if HAS_MASK:
        end = tl.load(end_ptr + b)
        end = tl.where(tile * BLOCK_M < end, end, 0)
    grad_q = tl.zeros((BLOCK_M, BLOCK_E), dtype=ACC)
    for start in range(0, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)  # [BN]
        k = _load_head(p_k, n, L, row_stride, cos_ptr, sin_ptr, E, BLOCK_E, ROTARY)
        v = _load_head(p_k + H * E, n, L, row_stride, cos_ptr, sin_ptr, E, BLOCK_E, False)
        valid_n = n < L
        if HAS_MASK:
            valid_n = tl.load(mask_ptr + sample + n, mask=valid_n, other=0) != 0
        valid = (m < L)[:, None] & valid_n[None, :]
        kept = valid
        if DROPOUT:
            kept = _kept(seed_ptr, m, n, head, threshold)
        _, grad_scores = _weights_and_gradient(
            q, k, v, grad, lse, delta, valid, kept, scale, inv_keep, DROPOUT, PRECISION, ACC
        )
        grad_q = tl.dot(grad_scores.to(k.dtype), k, grad_q, input_precision=PRECISION, out_dtype=ACC)

    grad_q *= scale
    if ROTARY:
        grad_q = _rotate_back(grad_q, m, L, cos_ptr, sin_ptr, E, BLOCK_E)
    p_grad = grad_qkv_ptr + (sample + m)[:, None] * row_stride + h * E + e[None, :]
    tl.store(p_grad, grad_q.to(grad_qkv_ptr.dtype.element_ty), mask=(m < L)[:, None] & (e < E)[None, :])


@triton.jit
def dropout_keep_kernel(seed_ptr, keep_ptr, L, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    head = tl.program_id(0)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets = (head.to(tl.int64) * L + m)[:, None] * L + n[None, :]
    kept = _kept(seed_ptr, m, n, head, threshold)
    tl.store(keep_ptr + offsets, kept.to(tl.uint8), mask=(m < L)[:, None] & (n < L)[None, :])


@dataclass(frozen=True)
class Tile:
    """Query and key rows of a program, and its schedule."""

    m: int
    n: int
    warps: int
    stages: int


#: Forward and backward tiles by element size and padded head size, chosen so that no configuration spills
#: or passes 64 KiB of shared memory on any target (the ahead-of-time tests hold them to it).
_FORWARD = {
    2: {
        16: Tile(64, 64, 4, 2),
        32: Tile(64, 64, 4, 2),
        64: Tile(64, 64, 4, 2),
        128: Tile(64, 64, 8, 1),
        256: Tile(64, 32, 8, 1),
    },
    4: {
        16: Tile(32, 32, 4, 1),
        32: Tile(32, 32, 4, 1),
        64: Tile(32, 16, 4, 1),
        128: Tile(32, 16, 8, 1),
        256: Tile(16, 16, 8, 1),
    },
}
_BACKWARD = {
    2: {
        16: Tile(64, 64, 8, 1),
        32: Tile(64, 64, 8, 1),
        64: Tile(64, 32, 4, 1),
        128: Tile(32, 64, 8, 1),
        256: Tile(16, 32, 8, 1),
    },
    4: {
        16: Tile(32, 32, 4, 1),
        32: Tile(32, 32, 4, 1),
        64: Tile(32, 16, 4, 1),
        128: Tile(16, 16, 8, 1),
        256: Tile(16, 16, 8, 1),
    },
}
_INTERPRETER = Tile(64, 64, 1, 1)


def choose_tile(head_dim: int, dtype: torch.dtype, backward: bool, target: Target) -> Tile:
    """Tiles for one attention kernel; by head size and dtype only, never by length."""
    if target.interpreted:
        return _INTERPRETER
    tile = (_BACKWARD if backward else _FORWARD)[dtype.itemsize][power_of_two(head_dim, 16)]
    if target.kind != "cuda":
        return replace(tile, stages=1)  # a second stage does not fit beside the tiles in AMD's 64 KiB
    datacenter_blackwell = isinstance(target.arch, int) and 100 <= target.arch < 120
    if datacenter_blackwell and tile == _FORWARD[2][16]:
        # Its accumulators lie outside the registers, and pass through them: 4 warps spill up to 256 bytes.
        return replace(tile, warps=8, stages=1)
    return tile


@dataclass(frozen=True)
class Dropout:
    """Probability of dropping an attention weight, and the device seed (int64 [1]) that decides which."""

    probability: float
    seed: Tensor | None

    @property
    def threshold(self) -> int:
        return round(self.probability * 2**32)


NO_DROPOUT = Dropout(0.0, None)


def mask_ends(mask: Tensor) -> Tensor:
    """One past the last valid position of each sample, int32 [B]; ``mask``: uint8 [B, L]."""
    positions = torch.arange(1, mask.shape[1] + 1, dtype=torch.int32, device=mask.device)
    return (mask * positions).amax(dim=1).to(torch.int32)


def _common(
    qkv: Tensor, n_heads: int, mask: Tensor | None, cos: Tensor | None, dropout: Dropout, backward: bool
) -> tuple[Tile, dict[str, Any], tuple[Any, ...]]:
    """Tile, constants, and the run-time numbers that the forward and backward launches share."""
    _, length, width = qkv.shape
    head_dim = width // (3 * n_heads)
    tile = choose_tile(head_dim, qkv.dtype, backward, target_of(qkv))
    constants = {
        "E": head_dim,
        "HAS_MASK": mask is not None,
        "ROTARY": cos is not None,
        "DROPOUT": dropout.probability > 0.0,
        "PRECISION": input_precision(qkv.dtype),
        "ACC": accumulator(qkv.dtype),
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_E": power_of_two(head_dim, 16),
        "warps": tile.warps,
        "stages": tile.stages,
    }
    keep = 1.0 - dropout.probability
    return tile, constants, (length, n_heads, head_dim**-0.5, dropout.threshold, 1.0 / keep)


def attention_forward(
    qkv: Tensor,
    n_heads: int,
    mask: Tensor | None = None,
    ends: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    dropout: Dropout = NO_DROPOUT,
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel.

    Args:
        qkv: Contiguous [B, L, 3 D], queries, keys and values side by side, heads inside.
        mask: uint8 [B, L], 1 = valid, with ``ends`` from :func:`mask_ends`.
        cos, sin: RoPE tables [L, E/2], float32 (or wider).

    Returns:
        Output [B, L, D], and the log2-sum-exp2 of the scaled scores [B, H, L] for the backward.
    """
    batch, length, width = qkv.shape
    tile, constants, numbers = _common(qkv, n_heads, mask, cos, dropout, backward=False)
    out = qkv.new_empty((batch, length, width // 3))
    wide = torch.promote_types(qkv.dtype, torch.float32)
    lse = qkv.new_empty((batch, n_heads, length), dtype=wide)
    launch(
        attention_kernel,
        (cdiv(length, tile.m) * batch * n_heads,),
        qkv, mask, ends, cos, sin, dropout.seed, out, lse, *numbers,
        **constants,
    )  # fmt: skip
    return out, lse


def attention_backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    n_heads: int,
    mask: Tensor | None = None,
    ends: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    dropout: Dropout = NO_DROPOUT,
) -> Tensor:
    """Gradient of the packed projections [B, L, 3 D], from that of the output (contiguous [B, L, D]).

    Gradients at masked rows of the output are ignored, as those rows are constant zeros.
    """
    batch, length, _ = qkv.shape
    tile, constants, numbers = _common(qkv, n_heads, mask, cos, dropout, backward=True)
    grad_qkv = torch.empty_like(qkv)
    delta = torch.empty_like(lse)
    heads = batch * n_heads
    launch(
        attention_delta_kernel,
        (cdiv(length, 64) * heads,),
        out, grad, delta, length, n_heads,
        E=constants["E"],
        ACC=constants["ACC"],
        BLOCK_M=64,
        BLOCK_E=constants["BLOCK_E"],
        warps=4,
    )  # fmt: skip
    args = (qkv, grad, mask, ends, cos, sin, dropout.seed, lse, delta, grad_qkv, *numbers)
    launch(attention_backward_kv_kernel, (cdiv(length, tile.n) * heads,), *args, **constants)
    launch(attention_backward_q_kernel, (cdiv(length, tile.m) * heads,), *args, **constants)
    return grad_qkv


def dropout_keep(dropout: Dropout, batch: int, n_heads: int, length: int) -> Tensor:
    """The mask that ``dropout`` stands for, bool [B, H, L, L], True = kept; for comparisons in tests."""
    assert dropout.seed is not None
    keep = torch.empty((batch, n_heads, length, length), dtype=torch.uint8, device=dropout.seed.device)
    launch(
        dropout_keep_kernel,
        (batch * n_heads, cdiv(length, 64), cdiv(length, 64)),
        dropout.seed, keep, length, dropout.threshold,
        BLOCK_M=64,
        BLOCK_N=64,
        warps=4,
    )  # fmt: skip
    return keep.bool()


def _attention_saving(
    qkv: Tensor,
    n_heads: int,
    mask: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, length, width = qkv.shape
    if width % (3 * n_heads):
        raise ValueError(f"expected packed projections [B, L, 3 D] of {n_heads} heads, got {list(qkv.shape)}")
    if mask is not None and mask.shape != (batch, length):
        raise ValueError(f"expected a mask {[batch, length]}, got {list(mask.shape)}")
    tables = (length, width // (6 * n_heads))
    if cos is not None and (sin is None or cos.shape != tables or sin.shape != tables):
        raise ValueError(f"expected two RoPE tables {list(tables)}")
    if dropout > 0.0 and seed is None:
        raise ValueError("dropout needs a seed, an int64 tensor of one element")
    mask, cos, sin = (None if tensor is None else tensor.contiguous() for tensor in (mask, cos, sin))
    ends = None if mask is None else mask_ends(mask)
    return attention_forward(qkv.contiguous(), n_heads, mask, ends, cos, sin, Dropout(dropout, seed))


def _attention(*arguments: Any) -> Tensor:
    return _attention_saving(*arguments)[0]


def _attention_backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    n_heads: int,
    mask: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> Tensor:
    mask, cos, sin = (None if tensor is None else tensor.contiguous() for tensor in (mask, cos, sin))
    ends = None if mask is None else mask_ends(mask)
    return attention_backward(
        grad.contiguous(), qkv.contiguous(), out, lse, n_heads, mask, ends, cos, sin, Dropout(dropout, seed)
    )


def _attention_fake(qkv: Tensor, *rest: Any) -> Tensor:
    batch, length, width = qkv.shape
    return qkv.new_empty((batch, length, width // 3))


def _attention_saving_fake(qkv: Tensor, n_heads: int, *rest: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(qkv.dtype, torch.float32)
    return _attention_fake(qkv), qkv.new_empty((qkv.shape[0], n_heads, qkv.shape[1]), dtype=wide)


def _attention_backward_fake(grad: Tensor, qkv: Tensor, *rest: Any) -> Tensor:
    return qkv.new_empty(qkv.shape)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, n_heads: int, *rest: Any) -> Tensor:
        out, lse = attention_saving(qkv, n_heads, *rest)
        mask, cos, sin, dropout, seed = rest
        ctx.save_for_backward(qkv, out, lse, mask, cos, sin, seed)
        ctx.n_heads, ctx.dropout = n_heads, dropout
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, out, lse, mask, cos, sin, seed = ctx.saved_tensors
        grad_qkv = attention_gradient(grad, qkv, out, lse, ctx.n_heads, mask, cos, sin, ctx.dropout, seed)
        return grad_qkv, None, None, None, None, None, None


_ARGUMENTS = "int n_heads, Tensor? mask, Tensor? cos, Tensor? sin, float dropout, Tensor? seed"
attention_saving = define(
    "attention_saving",
    f"(Tensor qkv, {_ARGUMENTS}) -> (Tensor, Tensor)",
    _attention_saving,
    _attention_saving_fake,
)
attention_gradient = define(
    "attention_backward",
    f"(Tensor grad, Tensor qkv, Tensor out, Tensor lse, {_ARGUMENTS}) -> Tensor",
    _attention_backward,
    _attention_backward_fake,
)
#: ``attention(qkv, n_heads, mask, cos, sin, dropout, seed)`` on packed projections [B, L, 3 D] gives
#: [B, L, D]; mask uint8 [B, L], tables [L, E/2], seed int64 [1], each of them optional.
attention = define(
    "attention",
    f"(Tensor qkv, {_ARGUMENTS}) -> Tensor",
    _attention,
    _attention_fake,
    _Attention.apply,
)
