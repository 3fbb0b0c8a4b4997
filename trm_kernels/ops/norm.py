"""add3 + RMSNorm and its backward, along the width or along the sequence.

The kernel normalises rows: the D values of one position (``axis=-1``) or, for the paper's token mixers, the L
values of one channel of one sample (``axis=1``). Strides let one kernel handle both.

    h = x + y + z
    out = h / sqrt(mean(h^2) + eps) * weight
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trm_kernels.first_order import first_order
from trm_kernels.ops._launch import Target, accumulator, cdiv, launch, power_of_two, target_of
from trm_kernels.ops._library import define

#: Number of columns per partial sum of squares; the width of every GEMM tile is a multiple of it.
SUMSQ_COLUMNS = tl.constexpr(32)


@triton.jit
def row_sum_parts(sums_ptr, rows, valid, PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr, ACC: tl.constexpr):
    """Return totals [BM] of the partial sums [rows, PARTS] that another kernel's tiles wrote."""
    p = tl.arange(0, PARTS_BLOCK)
    offsets = rows.to(tl.int64)[:, None] * PARTS + p[None, :]  # [BM, PARTS_BLOCK]
    partial = tl.load(sums_ptr + offsets, mask=valid[:, None] & (p < PARTS)[None, :], other=0.0)
    return tl.sum(partial.to(ACC), axis=1)


@triton.jit
def _row_tile(
    rows,
    cols,
    inner,
    stride_outer,
    stride_inner,
    stride_col,
    block,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Return row and column indices, element offsets [BR, BC] and their validity for one block of rows."""
    r = block * BLOCK_R + tl.arange(0, BLOCK_R)  # [BR]
    c = tl.arange(0, BLOCK_C)  # [BC]
    base = (r // inner).to(tl.int64) * stride_outer + (r % inner) * stride_inner
    offsets = base[:, None] + c[None, :] * stride_col  # [BR, BC]
    return r, c, offsets, (r < rows)[:, None] & (c < cols)[None, :]


@triton.jit
def add_rms_norm_kernel(
    x_ptr,
    y_ptr,
    z_ptr,
    weight_ptr,
    mask_ptr,
    count_ptr,
    sum_ptr,
    out_ptr,
    sumsq_ptr,
    rows,
    cols,
    inner,
    stride_outer,
    stride_inner,
    stride_col,
    eps,
    HAS_Y: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr,
    WRITE_SUM: tl.constexpr,
    WRITE_OUT: tl.constexpr,
    WRITE_SUMSQ: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    if PACKED:
        rows = tl.load(count_ptr)
    r, c, offsets, valid = _row_tile(
        rows, cols, inner, stride_outer, stride_inner, stride_col, tl.program_id(0), BLOCK_R, BLOCK_C
    )
    h = tl.load(x_ptr + offsets, mask=valid, other=0.0).to(ACC)  # [BR, BC]
    if HAS_Y:
        h += tl.load(y_ptr + offsets, mask=valid, other=0.0).to(ACC)
    if HAS_Z:
        h += tl.load(z_ptr + offsets, mask=valid, other=0.0).to(ACC)
    if WRITE_SUM:
        # Normalise the stored, rounded sum, because that is what later kernels read.
        stored = h.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + offsets, stored, mask=valid)
        h = stored.to(ACC)
    sumsq = tl.sum(h * h, axis=1)  # [BR]
    if WRITE_SUMSQ:
        tl.store(sumsq_ptr + r, sumsq, mask=r < rows)
    if WRITE_OUT:
        out = h * tl.rsqrt(sumsq / cols + eps)[:, None]
        if HAS_WEIGHT:
            out *= tl.load(weight_ptr + c, mask=c < cols, other=0.0).to(ACC)[None, :]
        if HAS_MASK:
            keep = tl.load(mask_ptr + r, mask=r < rows, other=0) != 0
            out = tl.where(keep[:, None], out, 0.0)
        tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=valid)


@triton.jit
def rms_norm_backward_kernel(
    grad_ptr,
    h_ptr,
    weight_ptr,
    residual_ptr,
    count_ptr,
    grad_h_ptr,
    normed_ptr,
    grad_weight_ptr,
    rows,
    cols,
    inner,
    stride_outer,
    stride_inner,
    stride_col,
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    WRITE_NORMED: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    if PACKED:
        rows = tl.load(count_ptr)
    # Each program writes one row of the weight's gradient, and the launcher sums them: without atomics, the
    # result is the same in every run.
    grad_weight = tl.zeros((BLOCK_C,), dtype=ACC)
    blocks = tl.cdiv(rows, BLOCK_R)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        _, c, offsets, valid = _row_tile(
            rows, cols, inner, stride_outer, stride_inner, stride_col, block, BLOCK_R, BLOCK_C
        )
        h = tl.load(h_ptr + offsets, mask=valid, other=0.0).to(ACC)  # [BR, BC]
        grad = tl.load(grad_ptr + offsets, mask=valid, other=0.0).to(ACC)
        scale = tl.rsqrt(tl.sum(h * h, axis=1) / cols + eps)[:, None]  # [BR, 1]
        unit = h * scale
        normed = unit
        if HAS_WEIGHT:
            weight = tl.load(weight_ptr + c, mask=c < cols, other=0.0).to(ACC)[None, :]
            grad_weight += tl.sum(grad * unit, axis=0)
            normed = unit * weight
            grad = grad * weight
        if WRITE_NORMED:
            tl.store(normed_ptr + offsets, normed.to(normed_ptr.dtype.element_ty), mask=valid)
        dot = tl.sum(grad * unit, axis=1)[:, None] / cols  # [BR, 1]
        grad_h = scale * (grad - unit * dot)
        if HAS_RESIDUAL:
            grad_h += tl.load(residual_ptr + offsets, mask=valid, other=0.0).to(ACC)
        tl.store(grad_h_ptr + offsets, grad_h.to(grad_h_ptr.dtype.element_ty), mask=valid)
    if HAS_WEIGHT:
        c = tl.arange(0, BLOCK_C)
        tl.store(grad_weight_ptr + tl.program_id(0).to(tl.int64) * cols + c, grad_weight, mask=c < cols)


@dataclass(frozen=True)
class _Rows:
    """A [B, L, D] tensor viewed as rows to normalise."""

    rows: int
    cols: int
    inner: int
    strides: tuple[int, int, int]
    block_r: int
    block_c: int
    warps: int

    @staticmethod
    def of(x: Tensor, axis: int, target: Target) -> _Rows:
        batch, length, width = x.shape
        if axis == -1:
            rows, cols, inner, strides = batch * length, width, 1, (width, 0, 1)
        else:
            rows, cols, inner, strides = batch * width, length, width, (length * width, 1, width)
        block_c = power_of_two(cols, 16)
        if target.interpreted:
            block_r = 256
        elif axis == -1:
            block_r = max(1, 1024 // block_c)
        else:
            block_r = max(8, min(64, 4096 // block_c))  # adjacent rows are adjacent in memory
        return _Rows(rows, cols, inner, strides, block_r, block_c, max(4, min(16, block_r * block_c // 256)))

    @property
    def blocks(self) -> int:
        return cdiv(self.rows, self.block_r)


def add_rms_norm(
    x: Tensor,
    y: Tensor | None = None,
    z: Tensor | None = None,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    eps: float,
    axis: int = -1,
    count: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    write_sum: bool = False,
    write_out: bool = True,
    write_sumsq: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Launch the forward kernel on contiguous [B, L, D] tensors.

    Args:
        count: Number of packed rows, int32 [1]. Rows after them are neither read nor written.
        out: Output tensor; allocated if None.

    Returns:
        The sum h [B, L, D], its normalised form [B, L, D] in ``out_dtype``, and the sums of squares
        [rows, 1]; None for each that was not requested.
    """
    assert mask is None or axis == -1, "a mask [B, L] requires rows along the width"
    view = _Rows.of(x, axis, target_of(x))
    total = torch.empty_like(x) if write_sum else None
    if write_out and out is None:
        out = torch.empty_like(x, dtype=out_dtype)
    wide = torch.promote_types(x.dtype, torch.float32)
    sumsq = torch.empty((view.rows, 1), dtype=wide, device=x.device) if write_sumsq else None
    launch(
        add_rms_norm_kernel,
        (view.blocks,),
        x, y, z, weight, mask, count, total, out, sumsq,
        view.rows, view.cols, view.inner, *view.strides, eps,
        HAS_Y=y is not None,
        HAS_Z=z is not None,
        HAS_WEIGHT=weight is not None,
        HAS_MASK=mask is not None,
        PACKED=count is not None,
        WRITE_SUM=write_sum,
        WRITE_OUT=write_out,
        WRITE_SUMSQ=write_sumsq,
        BLOCK_R=view.block_r,
        BLOCK_C=view.block_c,
        ACC=accumulator(x.dtype),
        warps=view.warps,
    )  # fmt: skip
    return total, out, sumsq


def rms_norm_backward(
    grad: Tensor,
    h: Tensor,
    weight: Tensor | None,
    residual: Tensor | None,
    *,
    eps: float,
    axis: int = -1,
    count: Tensor | None = None,
    normed_dtype: torch.dtype | None = None,
    grad_h: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute the gradient of ``rms_norm(h) * weight`` plus ``residual``, on contiguous [B, L, D] tensors.

    With n = h s, s = 1 / sqrt(mean(h^2) + eps) and g = grad * weight:
    ``dh = s (g - n mean(g n)) + residual`` and ``dweight = sum over rows of grad n``.

    Returns:
        dh [B, L, D] in the dtype of ``h``, dweight [D] or None, and, if ``normed_dtype`` is set, the weighted
        normalised input [B, L, D] (the operand of the following weight gradient).
    """
    target = target_of(h)
    view = _Rows.of(h, axis, target)
    grad_h = torch.empty_like(h) if grad_h is None else grad_h
    normed = None if normed_dtype is None else torch.empty_like(h, dtype=normed_dtype)
    # With a weight, four programs per multiprocessor hide the latency of the loop over rows; more would only
    # lengthen the sum of their partial gradients.
    programs = view.blocks if weight is None else min(view.blocks, 4 * target.processors)
    partial = None
    if weight is not None:
        wide = torch.promote_types(h.dtype, torch.float32)
        partial = torch.empty((programs, view.cols), dtype=wide, device=h.device)
    launch(
        rms_norm_backward_kernel,
        (programs,),
        grad, h, weight, residual, count, grad_h, normed, partial,
        view.rows, view.cols, view.inner, *view.strides, eps,
        HAS_WEIGHT=weight is not None,
        HAS_RESIDUAL=residual is not None,
        WRITE_NORMED=normed is not None,
        PACKED=count is not None,
        BLOCK_R=view.block_r,
        BLOCK_C=view.block_c,
        ACC=accumulator(h.dtype),
        warps=view.warps,
    )  # fmt: skip
    grad_weight = None if weight is None or partial is None else partial.sum(0).to(weight.dtype)
    return grad_h, grad_weight, normed


def _add3(
    x: Tensor, y: Tensor | None, z: Tensor | None, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    y, z = (None if addend is None else addend.contiguous() for addend in (y, z))
    for addend in (y, z):
        if addend is not None and (addend.shape != x.shape or addend.dtype != x.dtype):
            raise ValueError(f"expected addends of shape {list(x.shape)} and dtype {x.dtype}")
    if weight is not None:
        if weight.shape != x.shape[-1:]:
            raise ValueError(f"expected a weight [{x.shape[-1]}], got {list(weight.shape)}")
        weight = weight.contiguous()
    total, out, _ = add_rms_norm(x.contiguous(), y, z, weight, eps=eps, write_sum=True)
    assert total is not None and out is not None
    return total, out


def _add3_fake(
    x: Tensor, y: Tensor | None, z: Tensor | None, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _add3_backward(
    grad_sum: Tensor, grad_out: Tensor, h: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    grad_h, grad_weight, _ = rms_norm_backward(
        grad_out.contiguous(), h, weight, grad_sum.contiguous(), eps=eps
    )
    return grad_h, h.new_empty(0) if grad_weight is None else grad_weight


def _add3_backward_fake(
    grad_sum: Tensor, grad_out: Tensor, h: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(h), h.new_empty(0) if weight is None else torch.empty_like(weight)


class _Add3RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor | None, z: Tensor | None, weight: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        total, out = add3_rms_norm(x, y, z, weight, eps)
        ctx.save_for_backward(total, weight)
        ctx.eps, ctx.addends = eps, (y is not None, z is not None)
        return total, out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_sum: Tensor, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        h, weight = ctx.saved_tensors
        grad_h, grad_weight = add3_rms_norm_backward(grad_sum, grad_out, h, weight, ctx.eps)
        grad_y, grad_z = (grad_h if given else None for given in ctx.addends)
        return grad_h, grad_y, grad_z, None if weight is None else grad_weight, None


add3_rms_norm_backward = define(
    "add3_rms_norm_backward",
    "(Tensor grad_sum, Tensor grad_out, Tensor h, Tensor? weight, float eps) -> (Tensor, Tensor)",
    _add3_backward,
    _add3_backward_fake,
)
#: ``add3_rms_norm(x, y, z, weight, eps)`` returns ``h = x + y + z`` and ``rms_norm(h) * weight``, both
#: [B, L, D] in the dtype of x; y, z and weight [D] may be None.
add3_rms_norm = define(
    "add3_rms_norm",
    "(Tensor x, Tensor? y, Tensor? z, Tensor? weight, float eps) -> (Tensor, Tensor)",
    _add3,
    _add3_fake,
    _Add3RmsNorm.apply,
)
