"""One GEMM kernel, C = epilogue(A W^T), for every matrix product of a block that needs an epilogue.

    acc  = A[m, :] . W[n, :]
    acc *= 1 / sqrt(mean(h_m^2) + eps)        row scale of an RMSNorm, from partial sums of squares
    pre  = acc                                saved for training, before the bias
    act  = f(acc + bias[n])                   identity, GELU, or silu(gate) * up
    out  = act + residual[m, n]               0 in masked rows; can also normalise the residual and, if a tile
                                              holds complete rows, the output
    next = out + addend[m, n]                 the input of the next network call, x + y + z
    and the partial sums of squares of the rows of next (or out), for the norm that reads them

RMSNorm(h) @ W^T = 1 / rms(h) * (h @ (w * W)^T): the norm needs no separate kernel, only weights with w folded
in (``fold``) and the row sums from the kernel that wrote h. The row sums come from the producer's epilogue
and never from the A tile here, because on sm_90 Triton 3.6-3.9 allocates one slot too few in the ring buffer
of an operand that is also read in registers.

As a data gradient, the same kernel computes the backward of that norm: with G = dY / rms(h) and
dot = sum_n dY_n pre_n,

    dh = G W - h dot / (D (mean(h^2) + eps)) + residual

Both operands are loaded in the dtype of the multiplication: a cast would move the A tile through registers,
which the next step may overwrite while wgmma still reads them. If the residual stream is wider than the
operands (autocast), the epilogue also writes a rounded copy of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from trm_kernels.ops._launch import accumulator, cdiv, input_precision, launch, power_of_two, target_of
from trm_kernels.ops.dispatch import choose
from trm_kernels.ops.norm import SUMSQ_COLUMNS, row_sum_parts
from trm_kernels.ops.tiles import Activation, Kernel, Problem, heuristic

_GELU = tl.constexpr(Activation.GELU.value)
_SWIGLU = tl.constexpr(Activation.SWIGLU.value)
_SQRT_HALF = tl.constexpr(0.7071067811865476)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def program_tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Return the row tile, column tile and batch of this program.

    Tiles are ordered in groups of GROUP_M row blocks, so that concurrent programs share weights in L2. Tiles
    and batches use one grid axis, because the others are limited to 65535.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    batch = (tl.program_id(0) // (tiles_m * tiles_n)).to(tl.int64)
    pid = tl.program_id(0) % (tiles_m * tiles_n)
    group = pid // (GROUP_M * tiles_n)
    group_size = min(tiles_m - group * GROUP_M, GROUP_M)
    tile_m = group * GROUP_M + (pid % (GROUP_M * tiles_n)) % group_size
    tile_n = (pid % (GROUP_M * tiles_n)) // group_size
    return tile_m, tile_n, batch


@triton.jit
def gemm_kernel(
    a_ptr,
    w_ptr,
    bias_ptr,
    residual_ptr,
    addend_ptr,
    h_ptr,
    sumsq_ptr,
    dots_ptr,
    mask_ptr,
    count_ptr,
    a_scale_ptr,
    w_scale_ptr,
    pre_ptr,
    c_ptr,
    next_ptr,
    copy_ptr,
    out_sumsq_ptr,
    M,
    N,
    K,
    w_row,
    w_col,
    eps,
    ACTIVATION: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRODUCT: tl.constexpr,
    ROW_SCALE: tl.constexpr,
    NORM_GRADIENT: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_BLOCK: tl.constexpr,
    DOTS: tl.constexpr,
    DOTS_BLOCK: tl.constexpr,
    QUANTISED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RESIDUAL_SCALE: tl.constexpr,
    NORMALISE: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr,
    SAVE_PRE: tl.constexpr,
    WRITE_OUT: tl.constexpr,
    WRITE_COPY: tl.constexpr,
    OUT_SUMSQ: tl.constexpr,
    STREAM: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tile_m, tile_n, batch = program_tile(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    k = tl.arange(0, BLOCK_K)  # [BK]
    rows = M
    depth = K
    if PACKED:
        # A tile of padding neither computes nor stores anything.
        rows = tl.load(count_ptr)
        depth = tl.where(tile_m * BLOCK_M < rows, K, 0)
    in_m = m < rows
    in_n = n < N
    valid = in_m[:, None] & in_n[None, :]
    # Element (m, n) of a [B, L, N] tensor, or of a [B, N, D] tensor whose rows m are the D channels. Strides
    # are derived from the sizes, because every launch argument costs time on the host.
    GATED: tl.constexpr = ACTIVATION == _SWIGLU
    WIDTH = 2 * N if GATED else N
    a_row, a_col = (1, M) if TRANSPOSED else (K, 1)
    c_row, c_col = (1, M) if TRANSPOSED else (N, 1)
    pre_row, pre_col = (1, M) if TRANSPOSED else (WIDTH, 1)
    o_c = batch * N * M + m.to(tl.int64)[:, None] * c_row + n.to(tl.int64)[None, :] * c_col  # [BM, BN]
    o_pre = batch * WIDTH * M + m.to(tl.int64)[:, None] * pre_row + n.to(tl.int64)[None, :] * pre_col
    o_up = o_pre + N * pre_col

    # Hopper accumulates fp8 products with about 14 bits (arXiv 2412.19437, section 3.3), so tiles are summed
    # in float32 outside the tensor cores.
    IMPRECISE: tl.constexpr = BLOCK_K if QUANTISED else None
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    if GATED:
        acc_up = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    if PRODUCT:
        acc += tl.load(a_ptr + o_pre, mask=valid, other=0.0).to(ACC)
        if GATED:
            acc_up += tl.load(a_ptr + o_up, mask=valid, other=0.0).to(ACC)
    else:
        p_a = a_ptr + batch * K * M + m.to(tl.int64)[:, None] * a_row + k[None, :] * a_col  # [BM, BK]
        p_w = w_ptr + n.to(tl.int64)[None, :] * w_row + k[:, None] * w_col  # [BK, BN]
        if GATED:
            p_up = p_w + N * w_row
        for start in range(0, depth, BLOCK_K):
            in_k = k < depth - start
            b_a = tl.load(p_a, mask=in_m[:, None] & in_k[None, :], other=0.0)
            b_w = tl.load(p_w, mask=in_k[:, None] & in_n[None, :], other=0.0)
            acc = tl.dot(
                b_a, b_w, acc, input_precision=PRECISION, max_num_imprecise_acc=IMPRECISE, out_dtype=ACC
            )
            if GATED:
                b_up = tl.load(p_up, mask=in_k[:, None] & in_n[None, :], other=0.0)
                acc_up = tl.dot(
                    b_a,
                    b_up,
                    acc_up,
                    input_precision=PRECISION,
                    max_num_imprecise_acc=IMPRECISE,
                    out_dtype=ACC,
                )
                p_up += BLOCK_K * w_col
            p_a += BLOCK_K * a_col
            p_w += BLOCK_K * w_col

    if QUANTISED:
        scale = tl.load(a_scale_ptr + m, mask=in_m, other=0.0)
        acc *= scale[:, None] * tl.load(w_scale_ptr + n, mask=in_n, other=0.0)[None, :]
        if GATED:
            acc_up *= scale[:, None] * tl.load(w_scale_ptr + N + n, mask=in_n, other=0.0)[None, :]
    if ROW_SCALE:
        mean = row_sum_parts(sumsq_ptr, m, in_m, PARTS, PARTS_BLOCK, ACC) / K
        rstd = tl.rsqrt(mean + eps)
        acc *= rstd[:, None]
        if GATED:
            acc_up *= rstd[:, None]
    if SAVE_PRE:
        tl.store(pre_ptr + o_pre, acc.to(pre_ptr.dtype.element_ty), mask=valid)
        if GATED:
            tl.store(pre_ptr + o_up, acc_up.to(pre_ptr.dtype.element_ty), mask=valid)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(ACC)[None, :]
    if ACTIVATION == _GELU:
        acc = 0.5 * acc * (1.0 + tl.erf(acc * _SQRT_HALF))
    elif GATED:
        acc = acc * sigmoid(acc) * acc_up
    if NORM_GRADIENT:
        mean = row_sum_parts(sumsq_ptr, m, in_m, PARTS, PARTS_BLOCK, ACC) / N
        dot = row_sum_parts(dots_ptr, m, in_m, DOTS, DOTS_BLOCK, ACC)
        h = tl.load(h_ptr + o_c, mask=valid, other=0.0).to(ACC)
        acc -= h * (dot / (N * (mean + eps)))[:, None]
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + o_c, mask=valid, other=0.0).to(ACC)
        if RESIDUAL_SCALE:
            mean = row_sum_parts(sumsq_ptr, m, in_m, PARTS, PARTS_BLOCK, ACC) / N
            residual *= tl.rsqrt(mean + eps)[:, None]
        acc += residual
    if NORMALISE:
        # The tile holds complete rows.
        whole = tl.where(valid, acc, 0.0)
        acc *= tl.rsqrt(tl.sum(whole * whole, axis=1) / N + eps)[:, None]
    if HAS_MASK:
        keep = tl.load(mask_ptr + m, mask=in_m, other=0) != 0
        acc = tl.where(keep[:, None], acc, 0.0)
    if WRITE_OUT:
        tl.store(c_ptr + o_c, acc.to(c_ptr.dtype.element_ty), mask=valid)
    if HAS_ADDEND:
        acc += tl.load(addend_ptr + o_c, mask=valid, other=0.0).to(ACC)
        tl.store(next_ptr + o_c, acc.to(next_ptr.dtype.element_ty), mask=valid)
    if WRITE_COPY:
        tl.store(copy_ptr + o_c, acc.to(copy_ptr.dtype.element_ty), mask=valid)
    if OUT_SUMSQ:
        # Sum the rounded values, because the norm reads what was stored.
        rounded = tl.where(valid, acc.to(STREAM).to(ACC), 0.0)
        parts = tl.cdiv(N, SUMSQ_COLUMNS)
        part = tile_n * (BLOCK_N // SUMSQ_COLUMNS) + tl.arange(0, BLOCK_N // SUMSQ_COLUMNS)
        first = tl.arange(0, BLOCK_N // SUMSQ_COLUMNS) == 0
        row_sum = tl.sum(rounded * rounded, axis=1)  # [BM]
        # One sum per tile, in the first of the tile's slots; the others are zero.
        tl.store(
            out_sumsq_ptr + m.to(tl.int64)[:, None] * parts + part[None, :],
            tl.where(first[None, :], row_sum[:, None], 0.0),
            mask=in_m[:, None] & (part < parts)[None, :],
        )


@dataclass(frozen=True)
class FoldedNorm:
    """A norm whose weight is folded into the matrix: the epilogue scales rows by 1 / sqrt(mean + eps)."""

    sumsq: Tensor  # [rows, parts], partial sums of squares of the rows of its input
    eps: float


@dataclass(frozen=True)
class NormGradient:
    """The backward of a folded norm: the epilogue subtracts the component along its input h."""

    sumsq: Tensor  # [rows, parts], of h
    eps: float
    h: Tensor  # [B, L, N]
    dots: Tensor  # [rows, parts], partial dots of the gradient with h


@dataclass(frozen=True)
class Residual:
    """A tensor that the epilogue adds after the activation, RMS-normalised if ``sumsq`` is set."""

    value: Tensor  # shape of the output
    sumsq: Tensor | None = None  # [rows, parts], of the rows of value
    eps: float = 0.0


@dataclass(frozen=True)
class Outputs:
    """Outputs of a launch; tensors that are None are allocated.

    Attributes:
        out, next, copy, pre, sumsq: Output tensors, see :class:`Product`.
        keep: Whether to write the output in addition to ``next``.
        copy_dtype: Write a copy of ``next`` (or of the output) in this dtype.
        write_sumsq: Write the partial sums of squares of the rows of ``next`` (or of the output).
        save_pre: Write the pre-activations without the bias, because in bf16 a large bias would round them
            away.
    """

    out: Tensor | None = None
    next: Tensor | None = None
    copy: Tensor | None = None
    pre: Tensor | None = None
    sumsq: Tensor | None = None
    keep: bool = True
    copy_dtype: torch.dtype | None = None
    write_sumsq: bool = False
    save_pre: bool = False


@dataclass
class Product:
    """Results of a launch; None for those not requested."""

    out: Tensor | None  # [B, L, N]; transposed [B, N, D]
    next: Tensor | None  # like out
    copy: Tensor | None  # like out, operand dtype
    pre: Tensor | None  # pre-activations, twice as wide for SwiGLU, operand dtype
    sumsq: Tensor | None  # [rows, parts], see sumsq_parts


_OUT = Outputs()

#: Maximum number of columns of a complete row in one tile.
WHOLE_ROW = 128

_TRITON_DTYPE = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def sumsq_parts(width: int) -> int:
    """Return the number of partial sums of squares of a row with ``width`` columns."""
    return cdiv(width, SUMSQ_COLUMNS.value)


def _parts(sums: Tensor | None) -> tuple[int, int]:
    parts = 0 if sums is None else sums.shape[1]
    return parts, power_of_two(parts)


def gemm(
    a: Tensor,
    weight: Tensor,
    *,
    out_dtype: torch.dtype,
    bias: Tensor | None = None,
    activation: Activation = Activation.NONE,
    norm: FoldedNorm | NormGradient | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
    residual: Residual | None = None,
    normalise: float | None = None,
    addend: Tensor | None = None,
    mask: Tensor | None = None,
    count: Tensor | None = None,
    transposed: bool = False,
    outputs: Outputs = _OUT,
) -> Product:
    """Launch the kernel.

    Args:
        a: Contiguous [B, L, K] (rows m = B L); if ``transposed``, [B, K, D], read as B matrices [D, K].
        weight: [N, K] in the dtype of ``a``, any strides; for SwiGLU [2 N, K], gate above up.
        out_dtype: Dtype of the output and of ``next``.
        bias: [N].
        activation: Applied after the bias.
        norm: Norm before the product, or in the backward, after it.
        scales: Row scales [m] of an fp8 ``a`` and channel scales [N or 2 N] of an fp8 ``weight``.
        residual: Added after the activation.
        normalise: RMS-normalise the rows of the output with this eps; up to ``WHOLE_ROW`` columns.
        addend: Added to the output to form ``next``.
        mask: Rows to keep, uint8 [m]; the others are written as zeros.
        count: Number of packed rows, int32 [1]. Rows after them are neither read nor written.
        transposed: Contract over the sequence axis; the output is [B, N, D].
        outputs: What to write, and where.
    """
    batches, outer, inner = a.shape
    N = weight.shape[0] // (2 if activation.gated else 1)
    M, K, batch = (inner, outer, batches) if transposed else (batches * outer, inner, 1)

    def empty(columns: int, dtype: torch.dtype) -> Tensor:
        shape = (batches, columns, inner) if transposed else (batches, outer, columns)
        return a.new_empty(shape, dtype=dtype)

    assert weight.dtype == a.dtype, f"operands {a.dtype} and {weight.dtype}"
    target = target_of(a)
    back = norm if isinstance(norm, NormGradient) else None
    kernel: Kernel = "gemm" if outputs.copy_dtype is None else "stream"
    if back is not None:
        kernel = "norm_gradient"
    problem = Problem(kernel, M, N, K, batch, activation, a.dtype, transposed)
    choice = choose(problem, target)
    library = choice.route == "library"
    if library and (count is not None or scales is not None):
        # The library supports neither a number of packed rows nor row scales.
        library, choice = False, heuristic(problem, target)
    tile = choice.tile
    if normalise is not None:
        assert N <= WHOLE_ROW, f"a tile does not hold {N} columns"
        # 93 registers per thread on sm_90; 168 with 4 warps.
        tile = replace(tile, m=64, n=power_of_two(N, tile.n), warps=8)
    if library:
        a = torch.matmul(weight, a) if transposed else torch.matmul(a, weight.t())
    product = Product(outputs.out, outputs.next, outputs.copy, outputs.pre, outputs.sumsq)
    if outputs.keep and product.out is None:
        product.out = empty(N, out_dtype)
    if addend is not None and product.next is None:
        product.next = empty(N, out_dtype)
    if outputs.copy_dtype is not None and product.copy is None:
        product.copy = empty(N, outputs.copy_dtype)
    if outputs.save_pre and product.pre is None:
        product.pre = empty(N * (2 if activation.gated else 1), a.dtype)
    if outputs.write_sumsq and product.sumsq is None:
        wide = torch.promote_types(out_dtype, torch.float32)
        product.sumsq = a.new_empty((M, sumsq_parts(N)), dtype=wide)
    sumsq, eps = _one_norm(norm, residual, normalise)
    h, dots = (None, None) if back is None else (back.h, back.dots)
    a_scale, w_scale = (None, None) if scales is None else scales
    (parts, parts_block), (dot_parts, dots_block) = _parts(sumsq), _parts(dots)
    launch(
        gemm_kernel,
        (cdiv(M, tile.m) * cdiv(N, tile.n) * batch,),
        a, weight, bias, None if residual is None else residual.value, addend, h, sumsq, dots, mask, count,
        a_scale, w_scale, product.pre, product.out, product.next, product.copy, product.sumsq,
        M, N, K, weight.stride(0), weight.stride(1), eps,
        ACTIVATION=int(activation),
        TRANSPOSED=transposed,
        PRODUCT=library,
        ROW_SCALE=isinstance(norm, FoldedNorm),
        NORM_GRADIENT=back is not None,
        PARTS=parts,
        PARTS_BLOCK=parts_block,
        DOTS=dot_parts,
        DOTS_BLOCK=dots_block,
        QUANTISED=scales is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        RESIDUAL_SCALE=residual is not None and residual.sumsq is not None,
        NORMALISE=normalise is not None,
        HAS_ADDEND=addend is not None,
        HAS_MASK=mask is not None,
        PACKED=count is not None,
        SAVE_PRE=product.pre is not None,
        WRITE_OUT=product.out is not None,
        WRITE_COPY=product.copy is not None,
        OUT_SUMSQ=product.sumsq is not None,
        STREAM=_TRITON_DTYPE[out_dtype],
        ACC=accumulator(a.dtype),
        PRECISION=input_precision(a.dtype),
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        GROUP_M=8,
        warps=tile.warps,
        stages=tile.stages,
    )  # fmt: skip
    return product


def _one_norm(
    norm: FoldedNorm | NormGradient | None, residual: Residual | None, normalise: float | None
) -> tuple[Tensor | None, float]:
    """Return the sums of squares and eps of the only norm: the kernel has one pointer and one eps."""
    read = [part for part in (norm, residual) if part is not None and part.sumsq is not None]
    eps = {part.eps for part in read} | (set() if normalise is None else {normalise})
    assert len(read) <= 1 and len(eps) <= 1, "all norms of a launch share one pointer and one eps"
    return read[0].sumsq if read else None, next(iter(eps), 0.0)
