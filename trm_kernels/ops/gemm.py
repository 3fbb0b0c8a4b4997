"""One GEMM kernel, C = epilogue(A W^T), for every matrix product of a block that needs an epilogue.

    acc  = A[m, :] . W[n, :]
    acc *= 1 / sqrt(mean(h_m^2) + eps)        row scale of an RMSNorm, from partial sums of squares
    acc += bias[n]
    act  = gelu(acc) | silu(gate) * up        and, for training, the pre-activations
    out  = act + residual[m, n], or 0 at masked rows
    and the partial sums of squares of the output's rows, for the next norm

RMSNorm(h) @ W^T = 1 / rms(h) * (h @ (w * W)^T): the norm needs no kernel of its own, only weights with w
folded in (``fold``) and the row sums that the kernel which wrote h left behind. The row sums come from
the producer's epilogue and never from the A tile here: on sm_90 Triton 3.6-3.9 gives an operand that is
read a second time, in registers, a ring one slot short.

Both operands are read in the dtype they are multiplied in: a cast would take the A tile through registers,
which the next step may overwrite while wgmma still reads them.

The backward forms multiply by the derivative of the activation in the epilogue.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trm_kernels.ops._launch import (
    accumulator,
    cdiv,
    input_precision,
    launch,
    power_of_two,
    target_of,
)
from trm_kernels.ops.norm import SUMSQ_COLUMNS
from trm_kernels.ops.tiles import Activation, choose_tile

_GELU = tl.constexpr(Activation.GELU.value)
_SWIGLU = tl.constexpr(Activation.SWIGLU.value)
_GELU_BACKWARD = tl.constexpr(Activation.GELU_BACKWARD.value)
_SWIGLU_BACKWARD = tl.constexpr(Activation.SWIGLU_BACKWARD.value)
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def row_rstd(
    sumsq_ptr, rows, valid, width, eps, PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr, ACC: tl.constexpr
):
    """1 / sqrt(mean of squares + eps) of each row [BM] of ``width``, from partial sums [rows, PARTS]."""
    p = tl.arange(0, PARTS_BLOCK)
    offsets = rows.to(tl.int64)[:, None] * PARTS + p[None, :]  # [BM, PARTS_BLOCK]
    partial = tl.load(sumsq_ptr + offsets, mask=valid[:, None] & (p < PARTS)[None, :], other=0.0)
    return tl.rsqrt(tl.sum(partial.to(ACC), axis=1) / width + eps)


@triton.jit
def gemm_kernel(
    a_ptr,
    w_ptr,
    bias_ptr,
    residual_ptr,
    sumsq_ptr,
    mask_ptr,
    pre_ptr,
    act_ptr,
    c_ptr,
    out_sumsq_ptr,
    M,
    N,
    K,
    w_row,
    w_col,
    eps,
    ACTIVATION: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ROW_SCALE: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    SAVE_PRE: tl.constexpr,
    OUT_SUMSQ: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # Tiles in groups of GROUP_M row blocks, so that a wave of programs shares weights in L2.
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    # One grid axis for tiles and batches: the others end at 65535.
    batch = (tl.program_id(0) // (tiles_m * tiles_n)).to(tl.int64)
    pid = tl.program_id(0) % (tiles_m * tiles_n)
    group = pid // (GROUP_M * tiles_n)
    group_size = min(tiles_m - group * GROUP_M, GROUP_M)
    tile_m = group * GROUP_M + (pid % (GROUP_M * tiles_n)) % group_size
    tile_n = (pid % (GROUP_M * tiles_n)) // group_size

    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    k = tl.arange(0, BLOCK_K)  # [BK]
    in_m = m < M
    in_n = n < N
    # Element (m, n) of a [B, L, N] tensor, or of a [B, N, D] one whose rows m are the D channels. Strides
    # follow from the sizes: every argument of a launch costs time on the host.
    GATED: tl.constexpr = ACTIVATION == _SWIGLU
    PAIR: tl.constexpr = GATED or ACTIVATION == _SWIGLU_BACKWARD
    WIDTH = 2 * N if PAIR else N
    a_row, a_col = (1, M) if TRANSPOSED else (K, 1)
    c_row, c_col = (1, M) if TRANSPOSED else (N, 1)
    pre_row, pre_col = (1, M) if TRANSPOSED else (WIDTH, 1)
    a_batch = batch * K * M
    c_batch = batch * N * M
    pre_batch = batch * WIDTH * M
    p_a = a_ptr + a_batch + m.to(tl.int64)[:, None] * a_row + k[None, :] * a_col  # [BM, BK]
    p_w = w_ptr + n.to(tl.int64)[None, :] * w_row + k[:, None] * w_col  # [BK, BN]

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    if GATED:
        acc_up = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
        p_up = p_w + N * w_row
    for start in range(0, K, BLOCK_K):
        in_k = k < K - start
        b_a = tl.load(p_a, mask=in_m[:, None] & in_k[None, :], other=0.0)
        b_w = tl.load(p_w, mask=in_k[:, None] & in_n[None, :], other=0.0)
        acc = tl.dot(b_a, b_w, acc, input_precision=PRECISION, out_dtype=ACC)
        if GATED:
            b_up = tl.load(p_up, mask=in_k[:, None] & in_n[None, :], other=0.0)
            acc_up = tl.dot(b_a, b_up, acc_up, input_precision=PRECISION, out_dtype=ACC)
            p_up += BLOCK_K * w_col
        p_a += BLOCK_K * a_col
        p_w += BLOCK_K * w_col

    if ROW_SCALE:
        rstd = row_rstd(sumsq_ptr, m, in_m, K, eps, PARTS, PARTS_BLOCK, ACC)
        acc *= rstd[:, None]
        if GATED:
            acc_up *= rstd[:, None]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(ACC)[None, :]

    valid = in_m[:, None] & in_n[None, :]
    o_c = c_batch + m.to(tl.int64)[:, None] * c_row + n.to(tl.int64)[None, :] * c_col  # [BM, BN]
    o_pre = pre_batch + m.to(tl.int64)[:, None] * pre_row + n.to(tl.int64)[None, :] * pre_col
    o_up = o_pre + N * pre_col
    if SAVE_PRE:
        tl.store(pre_ptr + o_pre, acc.to(pre_ptr.dtype.element_ty), mask=valid)
        if GATED:
            tl.store(pre_ptr + o_up, acc_up.to(pre_ptr.dtype.element_ty), mask=valid)

    if ACTIVATION == _GELU:
        acc = 0.5 * acc * (1.0 + tl.erf(acc * _SQRT_HALF))
    elif ACTIVATION == _SWIGLU:
        acc = acc * _sigmoid(acc) * acc_up
    elif ACTIVATION == _GELU_BACKWARD:
        pre = tl.load(pre_ptr + o_pre, mask=valid, other=0.0).to(ACC)
        cdf = 0.5 * (1.0 + tl.erf(pre * _SQRT_HALF))
        tl.store(act_ptr + o_c, (pre * cdf).to(act_ptr.dtype.element_ty), mask=valid)
        acc = acc * (cdf + pre * tl.exp(-0.5 * pre * pre) * _INV_SQRT_2PI)
    elif ACTIVATION == _SWIGLU_BACKWARD:
        gate = tl.load(pre_ptr + o_pre, mask=valid, other=0.0).to(ACC)
        up = tl.load(pre_ptr + o_up, mask=valid, other=0.0).to(ACC)
        sigmoid = _sigmoid(gate)
        silu = gate * sigmoid
        tl.store(act_ptr + o_c, (silu * up).to(act_ptr.dtype.element_ty), mask=valid)
        grad_gate = acc * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        tl.store(c_ptr + o_pre, grad_gate.to(c_ptr.dtype.element_ty), mask=valid)
        tl.store(c_ptr + o_up, (acc * silu).to(c_ptr.dtype.element_ty), mask=valid)

    if ACTIVATION == _GELU_BACKWARD:
        tl.store(c_ptr + o_pre, acc.to(c_ptr.dtype.element_ty), mask=valid)
    elif ACTIVATION != _SWIGLU_BACKWARD:
        if HAS_RESIDUAL:
            acc += tl.load(residual_ptr + o_c, mask=valid, other=0.0).to(ACC)
        if HAS_MASK:
            keep = tl.load(mask_ptr + m, mask=in_m, other=0) != 0
            acc = tl.where(keep[:, None], acc, 0.0)
        out = acc.to(c_ptr.dtype.element_ty)
        tl.store(c_ptr + o_c, out, mask=valid)
        if OUT_SUMSQ:
            # Of the rounded values: the norm that reads them must see what was stored.
            rounded = tl.where(valid, out.to(ACC), 0.0)
            parts = tl.cdiv(N, SUMSQ_COLUMNS)
            part = tile_n * (BLOCK_N // SUMSQ_COLUMNS) + tl.arange(0, BLOCK_N // SUMSQ_COLUMNS)
            first = tl.arange(0, BLOCK_N // SUMSQ_COLUMNS) == 0
            row_sum = tl.sum(rounded * rounded, axis=1)  # [BM]
            # One sum a tile: it takes the first of the tile's slots, the others hold zeros.
            tl.store(
                out_sumsq_ptr + m.to(tl.int64)[:, None] * parts + part[None, :],
                tl.where(first[None, :], row_sum[:, None], 0.0),
                mask=in_m[:, None] & (part < parts)[None, :],
            )


@triton.jit
def fold_kernel(
    weight_ptr, norm_ptr, out_ptr, rows, cols, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr
):
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = (r < rows)[:, None] & (c < cols)[None, :]
    offsets = r.to(tl.int64)[:, None] * cols + c[None, :]
    weight = tl.load(weight_ptr + offsets, mask=valid, other=0.0).to(ACC)
    norm = tl.load(norm_ptr + c, mask=c < cols, other=0.0).to(ACC)
    tl.store(out_ptr + offsets, (weight * norm[None, :]).to(out_ptr.dtype.element_ty), mask=valid)


def fold(weights: tuple[Tensor, ...], norm: Tensor, dtype: torch.dtype) -> Tensor:
    """Stack weights [N_i, K] and scale their columns by a norm's weight [K], rounded once to ``dtype``."""
    cols = norm.shape[0]
    out = torch.empty((sum(weight.shape[0] for weight in weights), cols), dtype=dtype, device=norm.device)
    start = 0
    for weight in weights:
        rows = weight.shape[0]
        # Views of `out`: a row is a multiple of 16 elements wide wherever vector loads matter.
        launch(
            fold_kernel,
            (cdiv(rows, 32), cdiv(cols, 128)),
            weight.contiguous(), norm, out[start : start + rows], rows, cols,
            BLOCK_R=32,
            BLOCK_C=128,
            ACC=accumulator(dtype),
            warps=4,
        )  # fmt: skip
        start += rows
    return out


def sumsq_parts(width: int) -> int:
    """Partial sums of squares that a row of ``width`` columns is written with."""
    return cdiv(width, SUMSQ_COLUMNS.value)


def gemm(
    a: Tensor,
    weight: Tensor,
    *,
    out_dtype: torch.dtype,
    bias: Tensor | None = None,
    activation: Activation = Activation.NONE,
    sumsq: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    pre: Tensor | None = None,
    save_pre: bool = False,
    write_sumsq: bool = False,
    transposed: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Launch the kernel.

    Args:
        a: Contiguous [B, L, K] (rows m = B L), or, ``transposed``, [B, K, D] read as B matrices [D, K].
        weight: [N, K] in the dtype of ``a``, of any strides; [2 N, K], gate above up, for SwiGLU.
        bias: [N].
        activation: Applied after the bias. The backward forms read ``pre``, write the gradient of the
            pre-activation, and return the activation too.
        sumsq: Partial sums of squares [m, parts] of the rows of the normed input; scales row m by
            ``1 / sqrt(sum / K + eps)``.
        residual: Added after the activation; shape of the output.
        mask: Rows that survive, uint8 [m]; the others come out as zeros.
        pre: Pre-activations, for the backward forms.
        save_pre: Return the pre-activations.
        write_sumsq: Return the partial sums of squares [m, parts] of the output's rows.
        transposed: Contract over the sequence axis: the output is [B, N, D].

    Returns:
        Output ([B, L, N], transposed [B, N, D]; twice as wide for the gradient of SwiGLU's input);
        the pre-activations, or the recomputed activation for a backward form, or None; and the partial
        sums of squares or None.
    """
    operand = a.dtype
    assert weight.dtype == operand, f"operands {operand} and {weight.dtype}"
    batches, outer, inner = a.shape
    N = weight.shape[0] // (2 if activation == Activation.SWIGLU else 1)
    width = N * (2 if activation.gated else 1)
    M, K, batch = (inner, outer, batches) if transposed else (batches * outer, inner, 1)

    def shape(columns: int) -> tuple[int, int, int]:
        return (batches, columns, inner) if transposed else (batches, outer, columns)

    target = target_of(a)
    tile = choose_tile(M, N, batch, activation, operand, target, transposed=transposed)
    out = a.new_empty(shape(width if activation.backward else N), dtype=out_dtype)
    act = a.new_empty(shape(N), dtype=operand) if activation.backward else None
    if save_pre:
        pre = a.new_empty(shape(width), dtype=operand)
    out_sumsq = None
    if write_sumsq:
        wide = torch.promote_types(operand, torch.float32)
        out_sumsq = a.new_empty((M, sumsq_parts(N)), dtype=wide)
    parts = 0 if sumsq is None else sumsq.shape[1]
    launch(
        gemm_kernel,
        (cdiv(M, tile.m) * cdiv(N, tile.n) * batch,),
        a, weight, bias, residual, sumsq, mask, pre, act, out, out_sumsq,
        M, N, K, weight.stride(0), weight.stride(1), eps,
        ACTIVATION=int(activation),
        TRANSPOSED=transposed,
        ROW_SCALE=sumsq is not None,
        PARTS=parts,
        PARTS_BLOCK=power_of_two(parts),
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_MASK=mask is not None,
        SAVE_PRE=save_pre,
        OUT_SUMSQ=write_sumsq,
        ACC=accumulator(operand),
        PRECISION=input_precision(operand),
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        GROUP_M=8,
        warps=tile.warps,
        stages=tile.stages,
    )  # fmt: skip
    return out, (act if activation.backward else pre if save_pre else None), out_sumsq
