"""Row-wise fp8 quantisation (e4m3): one float32 scale per row maps its maximum to the maximum of fp8.

    v     = x * column, or x
    scale = max |v| / 448
    q     = v / scale                     in e4m3, saturating
    scale = scale / sqrt(mean(v^2) + eps) if the row is RMS-normalised, which costs nothing here

Used for rows of activations and for rows (output channels) of weights. The epilogue of a product applies both
scales (:mod:`~trm_kernels.ops.gemm`). Format: arXiv 2209.05433.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trm_kernels.ops._launch import cdiv, launch, power_of_two, target_of

FP8 = torch.float8_e4m3fn
_LARGEST = tl.constexpr(448.0)
#: Maximum columns of a tile; longer rows are read twice, tile by tile.
_COLUMNS = 4096


@triton.jit
def _load_rows(x_ptr, column_ptr, offsets, c, valid, cols, HAS_COLUMN: tl.constexpr):
    v = tl.load(x_ptr + offsets + c[None, :], mask=valid, other=0.0).to(tl.float32)
    if HAS_COLUMN:
        v *= tl.load(column_ptr + c, mask=c < cols, other=0.0).to(tl.float32)[None, :]
    return v


@triton.jit
def quantise_rows_kernel(
    x_ptr,
    column_ptr,
    count_ptr,
    q_ptr,
    scale_ptr,
    rows,
    cols,
    eps,
    HAS_COLUMN: tl.constexpr,
    NORM: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    if PACKED:
        rows = tl.load(count_ptr)
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_r = (r < rows)[:, None]
    offsets = r.to(tl.int64)[:, None] * cols
    largest = tl.zeros((BLOCK_R,), dtype=tl.float32)
    sumsq = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for start in range(0, cols, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        v = _load_rows(x_ptr, column_ptr, offsets, c, in_r & (c < cols)[None, :], cols, HAS_COLUMN)
        largest = tl.maximum(largest, tl.max(tl.abs(v), axis=1))
        if NORM:
            sumsq += tl.sum(v * v, axis=1)
    # A row of zeros stays zero.
    scale = tl.where(largest > 0.0, largest / _LARGEST, 1.0)
    for start in range(0, cols, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        valid = in_r & (c < cols)[None, :]
        v = _load_rows(x_ptr, column_ptr, offsets, c, valid, cols, HAS_COLUMN) / scale[:, None]
        # Rounding may push the largest value out of range, where e4m3 has NaN instead of infinity.
        v = tl.minimum(tl.maximum(v, -_LARGEST), _LARGEST)
        tl.store(q_ptr + offsets + c[None, :], v.to(q_ptr.dtype.element_ty), mask=valid)
    if NORM:
        scale *= tl.rsqrt(sumsq / cols + eps)
    tl.store(scale_ptr + r, scale, mask=r < rows)


def quantise_rows(
    x: Tensor, *, column: Tensor | None = None, eps: float | None = None, count: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Launch the kernel.

    Args:
        x: Contiguous [..., K].
        column: Multiplied with every row, [K] (the weight of a norm that is folded into a matrix).
        eps: Epsilon of an RMSNorm to apply to the rows; None for no norm.
        count: Number of packed rows, int32 [1].

    Returns:
        Values in e4m3 with the shape of ``x``, and the scale of each row, float32 [rows].
    """
    cols = x.shape[-1]
    rows = x.numel() // cols
    q = torch.empty_like(x, dtype=FP8)
    scale = x.new_empty((rows,), dtype=torch.float32)
    block_c = min(_COLUMNS, power_of_two(cols, 16))
    block_r = 256 if target_of(x).interpreted else max(1, 2048 // block_c)
    launch(
        quantise_rows_kernel,
        (cdiv(rows, block_r),),
        x, column, count, q, scale, rows, cols, 0.0 if eps is None else eps,
        HAS_COLUMN=column is not None,
        NORM=eps is not None,
        PACKED=count is not None,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        warps=max(4, min(16, block_r * block_c // 512)),
    )  # fmt: skip
    return q, scale
