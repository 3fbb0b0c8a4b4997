"""Backward of attention: one kernel over key blocks and one over query blocks, without atomics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from trm_kernels.ops._launch import cdiv, launch, power_of_two
from trm_kernels.ops.attention_common import (
    LOG2E,
    Heads,
    kept,
    load_bias,
    load_head,
    program,
    rotate_back,
    sample_rows,
    tables_of,
)
from trm_kernels.ops.norm import row_sum_parts


@triton.jit
def attention_delta_kernel(
    out_ptr,
    grad_ptr,
    bias_ptr,
    start_ptr,
    delta_ptr,
    through_ptr,
    R,
    L,
    H,
    E: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PACKED: tl.constexpr,
    DROPOUT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Compute delta [H, R], the softmax backward's row term: output times its gradient, summed over channels.

    The bias of the values adds the same term, grad . bias, to the gradient of every weight in a row. It is
    subtracted from delta here or, if dropout scales the gradient of each weight, stored separately.
    """
    tile, _, b, h = program(L, H, BLOCK_M)
    first, length = sample_rows(start_ptr, b, L, PACKED)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    e = tl.arange(0, BLOCK_E)
    valid = (m < length)[:, None] & (e < E)[None, :]
    offsets = (first + m)[:, None] * (H * E) + h * E + e[None, :]
    out = tl.load(out_ptr + offsets, mask=valid, other=0.0).to(ACC)
    grad = tl.load(grad_ptr + offsets, mask=valid, other=0.0).to(ACC)
    delta = tl.sum(out * grad, axis=1)
    rows = h.to(tl.int64) * R + first + m
    if HAS_BIAS:
        of_values = load_bias(bias_ptr + 2 * H * E + h * E, E, BLOCK_E, ACC)
        through_bias = tl.sum(grad * of_values[None, :], axis=1)
        if DROPOUT:
            tl.store(through_ptr + rows, through_bias, mask=m < length)
        else:
            delta -= through_bias
    tl.store(delta_ptr + rows, delta, mask=m < length)


@triton.jit
def _load_query(
    qkv_ptr, bias_ptr, grad_ptr, mask_ptr, cos_ptr, sin_ptr, lse_ptr, delta_ptr, through_ptr,
    m, first, length, h, R, H,
    E: tl.constexpr, BLOCK_E: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
    ROTARY: tl.constexpr, DROPOUT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Load a query block [BM, BE], its output gradient [BM, BE], lse, delta and value-bias term [BM]."""
    e = tl.arange(0, BLOCK_E)
    p_q = qkv_ptr + first * (3 * H * E) + h * E
    q = load_head(p_q, m, length, 3 * H * E, cos_ptr, sin_ptr, E, BLOCK_E, ROTARY)
    counted = m < length
    if HAS_MASK:
        counted = tl.load(mask_ptr + first + m, mask=counted, other=0) != 0
    p_grad = grad_ptr + (first + m)[:, None] * (H * E) + h * E + e[None, :]
    grad = tl.load(p_grad, mask=counted[:, None] & (e < E)[None, :], other=0.0)
    rows = h.to(tl.int64) * R + first + m
    lse = tl.load(lse_ptr + rows, mask=m < length, other=0.0)
    delta = tl.load(delta_ptr + rows, mask=counted, other=0.0)
    through_bias = tl.zeros_like(delta)
    if HAS_BIAS:
        q = (q.to(ACC) + load_bias(bias_ptr + h * E, E, BLOCK_E, ACC)[None, :]).to(q.dtype)
        if DROPOUT:
            through_bias = tl.load(through_ptr + rows, mask=counted, other=0.0)
    return q, grad, lse, delta, through_bias


@triton.jit
def _weights_and_gradient(
    q, k, v, grad, lse, delta, through_bias, valid, keep, scale, inv_keep,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Compute the attention weights after dropout and the gradient of the scores, both [BM, BN]."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC) * (scale * LOG2E)
    weights = tl.where(valid, tl.exp2(scores - lse[:, None]), 0.0)
    grad_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)
    dropped = weights
    if DROPOUT:
        if HAS_BIAS:
            grad_weights += through_bias[:, None]
        dropped = tl.where(keep, weights * inv_keep, 0.0)
        grad_weights = tl.where(keep, grad_weights * inv_keep, 0.0)
    return dropped, weights * (grad_weights - delta[:, None])


@triton.jit
def _row_rstd(
    sumsq_ptr, rows, valid, width, eps, PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr, ACC: tl.constexpr
):
    return tl.rsqrt(row_sum_parts(sumsq_ptr, rows, valid, PARTS, PARTS_BLOCK, ACC) / width + eps)


@triton.jit(do_not_specialize=["call"])
def attention_backward_kv_kernel(
    qkv_ptr,
    grad_ptr,
    bias_ptr,
    mask_ptr,
    end_ptr,
    start_ptr,
    cos_ptr,
    sin_ptr,
    seed_ptr,
    lse_ptr,
    delta_ptr,
    through_ptr,
    sumsq_ptr,
    grad_qkv_ptr,
    dots_ptr,
    columns_ptr,
    R,
    L,
    H,
    call,
    scale,
    threshold,
    inv_keep,
    eps,
    E: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr,
    ROTARY: tl.constexpr,
    DROPOUT: tl.constexpr,
    NORMED: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    tile, head, b, h = program(L, H, BLOCK_N)
    first, length = sample_rows(start_ptr, b, L, PACKED)
    if ROTARY:
        cos_ptr, sin_ptr = tables_of(cos_ptr, sin_ptr, first, E, PACKED)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    e = tl.arange(0, BLOCK_E)
    row_stride = 3 * H * E
    p_k = qkv_ptr + first * row_stride + H * E + h * E
    k = load_head(p_k, n, length, row_stride, cos_ptr, sin_ptr, E, BLOCK_E, ROTARY)  # [BN, BE]
    v = load_head(p_k + H * E, n, length, row_stride, cos_ptr, sin_ptr, E, BLOCK_E, False)

    end = length
    in_n = n < length
    valid_n = in_n
    if HAS_MASK:
        end = tl.load(end_ptr + b)
        valid_n = tl.load(mask_ptr + first + n, mask=in_n, other=0) != 0
    end = tl.where(tile * BLOCK_N < end, end, 0)
    grad_k = tl.zeros((BLOCK_N, BLOCK_E), dtype=ACC)
    grad_v = tl.zeros((BLOCK_N, BLOCK_E), dtype=ACC)
    for start in range(0, end, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)  # [BM]
        q, grad, lse, delta, through_bias = _load_query(
            qkv_ptr, bias_ptr, grad_ptr, mask_ptr, cos_ptr, sin_ptr, lse_ptr, delta_ptr, through_ptr,
            m, first, length, h, R, H, E, BLOCK_E, HAS_BIAS, HAS_MASK, ROTARY, DROPOUT, ACC,
        )  # fmt: skip
        valid = (m < length)[:, None] & valid_n[None, :]
        keep = valid
        if DROPOUT:
            keep = kept(seed_ptr, call, m, n, head, threshold)
        weights, grad_scores = _weights_and_gradient(
            q, k, v, grad, lse, delta, through_bias, valid, keep, scale, inv_keep,
            HAS_BIAS, DROPOUT, PRECISION, ACC,
        )  # fmt: skip
        grad_v = tl.dot(
            tl.trans(weights.to(grad.dtype)), grad, grad_v, input_precision=PRECISION, out_dtype=ACC
        )
        grad_k = tl.dot(
            tl.trans(grad_scores.to(q.dtype)), q, grad_k, input_precision=PRECISION, out_dtype=ACC
        )

    grad_k *= scale
    in_e = e < E
    if NORMED:
        # Rotations preserve the dot product, so the rotated keys can be used.
        dot = tl.sum(grad_k * k.to(ACC), axis=1) + tl.sum(grad_v * v.to(ACC), axis=1)
        tl.store(dots_ptr + (first + n) * (2 * H) + H + h, dot, mask=in_n)
    if HAS_BIAS:
        part = (b * tl.cdiv(L, BLOCK_N) + tile).to(tl.int64)
        p_columns = columns_ptr + part * (2 * H * E) + h * E + e
        tl.store(p_columns, tl.sum(grad_k, axis=0), mask=in_e)
        tl.store(p_columns + H * E, tl.sum(grad_v, axis=0), mask=in_e)
    if ROTARY:
        grad_k = rotate_back(grad_k, n, length, cos_ptr, sin_ptr, E, BLOCK_E)
    if NORMED:
        rstd = _row_rstd(sumsq_ptr, first + n, in_n, H * E, eps, PARTS, PARTS_BLOCK, ACC)[:, None]
        grad_k *= rstd
        grad_v *= rstd
    p_grad = grad_qkv_ptr + (first + n)[:, None] * row_stride + H * E + h * E + e[None, :]
    stored = in_n[:, None] & in_e[None, :]
    tl.store(p_grad, grad_k.to(grad_qkv_ptr.dtype.element_ty), mask=stored)
    tl.store(p_grad + H * E, grad_v.to(grad_qkv_ptr.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["call"])
def attention_backward_q_kernel(
    qkv_ptr,
    grad_ptr,
    bias_ptr,
    mask_ptr,
    end_ptr,
    start_ptr,
    cos_ptr,
    sin_ptr,
    seed_ptr,
    lse_ptr,
    delta_ptr,
    through_ptr,
    sumsq_ptr,
    grad_qkv_ptr,
    dots_ptr,
    columns_ptr,
    R,
    L,
    H,
    call,
    scale,
    threshold,
    inv_keep,
    eps,
    E: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr,
    ROTARY: tl.constexpr,
    DROPOUT: tl.constexpr,
    NORMED: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_BLOCK: tl.constexpr,
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
    q, grad, lse, delta, through_bias = _load_query(
        qkv_ptr, bias_ptr, grad_ptr, mask_ptr, cos_ptr, sin_ptr, lse_ptr, delta_ptr, through_ptr,
        m, first, length, h, R, H, E, BLOCK_E, HAS_BIAS, HAS_MASK, ROTARY, DROPOUT, ACC,
    )  # fmt: skip
    p_q = qkv_ptr + first * row_stride + h * E
    end = length
    if HAS_MASK:
        end = tl.load(end_ptr + b)
    end = tl.where(tile * BLOCK_M < end, end, 0)
    grad_q = tl.zeros((BLOCK_M, BLOCK_E), dtype=ACC)
    for start in range(0, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)  # [BN]
        k = load_head(p_q + H * E, n, length, row_stride, cos_ptr, sin_ptr, E, BLOCK_E, ROTARY)
        v = load_head(p_q + 2 * H * E, n, length, row_stride, cos_ptr, sin_ptr, E, BLOCK_E, False)
        valid_n = n < length
        if HAS_MASK:
            valid_n = tl.load(mask_ptr + first + n, mask=valid_n, other=0) != 0
        valid = (m < length)[:, None] & valid_n[None, :]
        keep = valid
        if DROPOUT:
            keep = kept(seed_ptr, call, m, n, head, threshold)
        _, grad_scores = _weights_and_gradient(
            q, k, v, grad, lse, delta, through_bias, valid, keep, scale, inv_keep,
            HAS_BIAS, DROPOUT, PRECISION, ACC,
        )  # fmt: skip
        grad_q = tl.dot(grad_scores.to(k.dtype), k, grad_q, input_precision=PRECISION, out_dtype=ACC)

    grad_q *= scale
    in_m = m < length
    in_e = e < E
    if NORMED:
        # Reload, because q contains the bias, which the norm does not affect.
        stored_q = load_head(p_q, m, length, row_stride, cos_ptr, sin_ptr, E, BLOCK_E, ROTARY)
        dot = tl.sum(grad_q * stored_q.to(ACC), axis=1)
        tl.store(dots_ptr + (first + m) * (2 * H) + h, dot, mask=in_m)
    if HAS_BIAS:
        part = (b * tl.cdiv(L, BLOCK_M) + tile).to(tl.int64)
        tl.store(columns_ptr + part * (H * E) + h * E + e, tl.sum(grad_q, axis=0), mask=in_e)
    if ROTARY:
        grad_q = rotate_back(grad_q, m, length, cos_ptr, sin_ptr, E, BLOCK_E)
    if NORMED:
        grad_q *= _row_rstd(sumsq_ptr, first + m, in_m, H * E, eps, PARTS, PARTS_BLOCK, ACC)[:, None]
    p_grad = grad_qkv_ptr + (first + m)[:, None] * row_stride + h * E + e[None, :]
    tl.store(p_grad, grad_q.to(grad_qkv_ptr.dtype.element_ty), mask=in_m[:, None] & in_e[None, :])


@dataclass
class ProjectionGradient:
    """Outputs of the kernels."""

    qkv: Tensor  # [B, L, 3 D]; divided by rms(h) if the norm before the projections is folded
    dots: Tensor | None  # partial dots of the projections and their gradient [R, 2 H], for that norm
    bias: Tensor | None  # gradient of the bias [3 D], float32


def attention_backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    heads: Heads,
    *,
    sumsq: Tensor | None = None,
    eps: float = 0.0,
    grad_qkv: Tensor | None = None,
) -> ProjectionGradient:
    """Compute the gradient of the packed projections from the gradient of the output.

    Gradients in masked rows of the output are ignored, because those rows are constant zeros.

    Args:
        grad: Gradient of ``out``, contiguous [B, L, D].
        qkv, out, lse, heads: As in the forward.
        sumsq: Partial sums of squares [R, parts] of the rows whose RMSNorm (with ``eps``) is folded into the
            projections.
        grad_qkv: Output tensor; allocated if None.
    """
    batch, length, width = qkv.shape
    rows, width = batch * length, width // 3
    n_heads, samples = heads.n_heads, heads.samples
    tile = heads.tile(qkv, width, backward=True)
    constants = heads.constants(qkv, width, tile)
    grad_qkv = torch.empty_like(qkv) if grad_qkv is None else grad_qkv
    delta = torch.empty_like(lse)
    through = torch.empty_like(lse) if constants["HAS_BIAS"] and constants["DROPOUT"] else None
    launch(
        attention_delta_kernel,
        (cdiv(samples.length, 64) * samples.batch * n_heads,),
        out, grad, heads.bias, samples.starts, delta, through, rows, samples.length, n_heads,
        E=constants["E"],
        HAS_BIAS=constants["HAS_BIAS"],
        PACKED=constants["PACKED"],
        DROPOUT=constants["DROPOUT"],
        ACC=constants["ACC"],
        BLOCK_M=64,
        BLOCK_E=constants["BLOCK_E"],
        warps=4,
    )  # fmt: skip
    parts = 0 if sumsq is None else sumsq.shape[1]
    constants |= {"NORMED": sumsq is not None, "PARTS": parts, "PARTS_BLOCK": power_of_two(parts)}
    dots = None if sumsq is None else lse.new_empty((rows, 2 * n_heads))
    tiles_q, tiles_kv = (samples.batch * cdiv(samples.length, block) for block in (tile.m, tile.n))
    columns_q = columns_kv = None
    if heads.bias is not None:
        columns_q, columns_kv = lse.new_empty((tiles_q, width)), lse.new_empty((tiles_kv, 2 * width))
    common = (qkv, grad, *heads.pointers, lse, delta, through, sumsq, grad_qkv, dots)
    scalars = (rows, *heads.scalars(width), eps)
    launch(attention_backward_kv_kernel, (tiles_kv * n_heads,), *common, columns_kv, *scalars, **constants)
    launch(attention_backward_q_kernel, (tiles_q * n_heads,), *common, columns_q, *scalars, **constants)
    bias = (
        None if columns_q is None or columns_kv is None else torch.cat((columns_q.sum(0), columns_kv.sum(0)))
    )
    return ProjectionGradient(grad_qkv, dots, bias)
