"""Softmax attention over packed projections [B, L, 3, H, E]: key masks, RoPE, dropout, any head size.

Forward and backward never store a score matrix (FlashAttention-2, arXiv 2307.08691). The backward consists of
two kernels, one over key blocks and one over query blocks, so that it needs no atomics.

- Mask [B, L]: padding is not attended to, and its output rows are zero. A sample without valid positions
  returns zeros and no NaN. Keys after a sample's last valid position are skipped.
- RoPE (NeoX layout) is applied when queries and keys are loaded; their gradients are rotated back before they
  are stored.
- Dropout: Philox with a device seed as key and (query, key, sample and head, call) as counter. The backward
  draws the same numbers, so no mask is stored. A captured graph draws new numbers when the seed changes.
- Packed rows: samples of any lengths one after another, without padding, [1, R, 3 D] with ``starts``.
- Bias of the projections: added when they are loaded; they are stored without it. The bias of the keys shifts
  all scores of a query equally and is omitted. The bias of the values is added to the output.
- In a block whose norm is folded, the backward also divides the gradient by the RMS of its row and writes the
  row dots for the norm's backward (:mod:`~trm_kernels.ops.gemm`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trm_kernels.ops._launch import cdiv, launch
from trm_kernels.ops.attention_common import (
    LOG2E,
    Dropout,
    Heads,
    kept,
    load_bias,
    load_head,
    program,
    sample_rows,
    tables_of,
)


@triton.jit(do_not_specialize=["call"])
def attention_kernel(
    qkv_ptr,
    bias_ptr,
    mask_ptr,
    end_ptr,
    start_ptr,
    cos_ptr,
    sin_ptr,
    seed_ptr,
    out_ptr,
    lse_ptr,
    R,
    L,
    H,
    call,
    scale,
    threshold,
    inv_keep,
    E: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr,
    ROTARY: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    tile, head, b, h = program(L, H, BLOCK_M)
    first, length = sample_rows(start_ptr, b, L, PACKED)
    if ROTARY:
        cos_ptr, sin_ptr = tables_of(cos_ptr, sin_ptr, first, E, PACKED)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    e = tl.arange(0, BLOCK_E)
    row_stride = 3 * H * E
    p_q = qkv_ptr + first * row_stride + h * E
    q = load_head(p_q, m, length, row_stride, cos_ptr, sin_ptr, E, BLOCK_E, ROTARY)  # [BM, BE]
    if HAS_BIAS:
        q = (q.to(ACC) + load_bias(bias_ptr + h * E, E, BLOCK_E, ACC)[None, :]).to(q.dtype)

    end = length
    keep_row = m < length
    if HAS_MASK:
        end = tl.load(end_ptr + b)
        keep_row = tl.load(mask_ptr + first + m, mask=keep_row, other=0) != 0
    # The queries of a tile after the last valid position are all padding.
    end = tl.where(tile * BLOCK_M < end, end, 0)
    highest = tl.full((BLOCK_M,), float("-inf"), dtype=ACC)
    total = tl.zeros((BLOCK_M,), dtype=ACC)
    kept_total = tl.zeros((BLOCK_M,), dtype=ACC)
    acc = tl.zeros((BLOCK_M, BLOCK_E), dtype=ACC)
    for start in range(0, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)  # [BN]
        k = load_head(p_q + H * E, n, length, row_stride, cos_ptr, sin_ptr, E, BLOCK_E, ROTARY)  # [BN, BE]
        v = load_head(p_q + 2 * H * E, n, length, row_stride, cos_ptr, sin_ptr, E, BLOCK_E, False)
        valid = n < length
        if HAS_MASK:
            valid = tl.load(mask_ptr + first + n, mask=valid, other=0) != 0
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC) * (scale * LOG2E)
        scores = tl.where(valid[None, :], scores, float("-inf"))  # [BM, BN], in powers of two
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        # The maximum of a row without a valid key so far is -inf, and -inf - -inf is NaN.
        shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(highest - shift)
        total = total * decay + tl.sum(weights, axis=1)
        if DROPOUT:
            weights = tl.where(kept(seed_ptr, call, m, n, head, threshold), weights * inv_keep, 0.0)
            if HAS_BIAS:
                kept_total = kept_total * decay + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION, out_dtype=ACC)
        highest = new_highest

    if HAS_BIAS:
        if not DROPOUT:
            kept_total = total
        acc += kept_total[:, None] * load_bias(bias_ptr + 2 * H * E + h * E, E, BLOCK_E, ACC)[None, :]
    safe = tl.where(total > 0.0, total, 1.0)
    out = tl.where(keep_row[:, None], acc / safe[:, None], 0.0)
    p_out = out_ptr + (first + m)[:, None] * (H * E) + h * E + e[None, :]
    tl.store(p_out, out.to(out_ptr.dtype.element_ty), mask=(m < length)[:, None] & (e < E)[None, :])
    lse = tl.where(total > 0.0, highest + tl.log2(safe), 0.0)
    tl.store(lse_ptr + h.to(tl.int64) * R + first + m, lse, mask=m < length)


def attention_forward(
    qkv: Tensor, heads: Heads, *, out: Tensor | None = None, lse: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel.

    Args:
        qkv: Contiguous [B, L, 3 D], or packed [1, R, 3 D].
        heads: Arguments of the attention.
        out, lse: Output tensors; allocated if None.

    Returns:
        Output [B, L, D], and the log2-sum-exp2 of the scaled scores [H, R] for the backward.
    """
    batch, length, width = qkv.shape
    rows, width = batch * length, width // 3
    tile = heads.tile(qkv, width, backward=False)
    out = qkv.new_empty((batch, length, width)) if out is None else out
    if lse is None:
        lse = qkv.new_empty((heads.n_heads, rows), dtype=torch.promote_types(qkv.dtype, torch.float32))
    samples = heads.samples
    launch(
        attention_kernel,
        (cdiv(samples.length, tile.m) * samples.batch * heads.n_heads,),
        qkv, *heads.pointers, out, lse, rows, *heads.scalars(width),
        **heads.constants(qkv, width, tile),
    )  # fmt: skip
    return out, lse


@triton.jit
def dropout_keep_kernel(seed_ptr, keep_ptr, L, call, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    head = tl.program_id(0)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets = (head.to(tl.int64) * L + m)[:, None] * L + n[None, :]
    keep = kept(seed_ptr, call, m, n, head, threshold)
    tl.store(keep_ptr + offsets, keep.to(tl.uint8), mask=(m < L)[:, None] & (n < L)[None, :])


def dropout_keep(dropout: Dropout, batch: int, n_heads: int, length: int) -> Tensor:
    """Return the mask that ``dropout`` applies, bool [B, H, L, L], True = kept; for comparisons in tests."""
    assert dropout.seed is not None
    keep = torch.empty((batch, n_heads, length, length), dtype=torch.uint8, device=dropout.seed.device)
    launch(
        dropout_keep_kernel,
        (batch * n_heads, cdiv(length, 64), cdiv(length, 64)),
        dropout.seed, keep, length, dropout.call, dropout.threshold,
        BLOCK_M=64,
        BLOCK_N=64,
        warps=4,
    )  # fmt: skip
    return keep.bool()
