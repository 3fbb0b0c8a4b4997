"""The input of a network call: x + y + z, or the normalised output of the previous call plus x + y.

    v    = z, or z / sqrt(mean(z^2) + eps) * weight
    pair = x + y                          constant over the latent steps
    h    = pair + v                       x and y are optional
    and the sums of squares of the rows of h

The last norm of a post-norm block and ``SequenceTRM``'s ``output_norm`` come between a call's output and the
sum that starts the next call. The epilogue that writes a row does not know its scale, so this kernel applies
them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from trm_kernels.ops._launch import accumulator, cdiv, launch, power_of_two, target_of
from trm_kernels.ops.gemm import Outputs, sumsq_parts


def rows_of(x: Tensor, read: Tensor) -> Tensor:
    """Return the rows ``read`` [N] of a tensor [B, L, D] as [1, N, D]."""
    return x.flatten(0, 1).index_select(0, read)[None]


@dataclass
class Stream:
    """The residual stream between two kernels."""

    value: Tensor  # [B, L, D]
    copy: Tensor | None = None  # [B, L, D] in the operand dtype, if that differs
    sumsq: Tensor | None = None  # [rows, parts]

    @property
    def operand(self) -> Tensor:
        """Operand of the next GEMM."""
        return self.value if self.copy is None else self.copy

    def rows(self, read: Tensor) -> Stream:
        """Return the rows ``read`` [N] for a residual, without the copy."""
        sumsq = None if self.sumsq is None else self.sumsq.index_select(0, read)
        return Stream(rows_of(self.value, read), sumsq=sumsq)


@triton.jit
def stream_kernel(
    x_ptr,
    y_ptr,
    z_ptr,
    weight_ptr,
    count_ptr,
    pair_ptr,
    normed_ptr,
    h_ptr,
    copy_ptr,
    sumsq_ptr,
    rows,
    cols,
    eps,
    HAS_X: tl.constexpr,
    HAS_Y: tl.constexpr,
    HAS_Z: tl.constexpr,
    NORM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    PACKED: tl.constexpr,
    WRITE_NORMED: tl.constexpr,
    WRITE_COPY: tl.constexpr,
    WRITE_H: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_BLOCK: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    if PACKED:
        rows = tl.load(count_ptr)
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    offsets = r.to(tl.int64)[:, None] * cols + c[None, :]  # [BR, BC]
    valid = (r < rows)[:, None] & (c < cols)[None, :]
    h = tl.zeros((BLOCK_R, BLOCK_C), dtype=ACC)
    if HAS_Z:
        h += tl.load(z_ptr + offsets, mask=valid, other=0.0).to(ACC)
    if NORM:
        h *= tl.rsqrt(tl.sum(h * h, axis=1) / cols + eps)[:, None]
        if HAS_WEIGHT:
            h *= tl.load(weight_ptr + c, mask=c < cols, other=0.0).to(ACC)[None, :]
        if WRITE_NORMED:
            tl.store(normed_ptr + offsets, h.to(normed_ptr.dtype.element_ty), mask=valid)
    if HAS_Y:
        pair = tl.load(y_ptr + offsets, mask=valid, other=0.0).to(ACC)
        if HAS_X:
            pair += tl.load(x_ptr + offsets, mask=valid, other=0.0).to(ACC)
            rounded = pair.to(pair_ptr.dtype.element_ty)
            tl.store(pair_ptr + offsets, rounded, mask=valid)
            pair = rounded.to(ACC)
        h += pair
    if WRITE_H:
        stored = h.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + offsets, stored, mask=valid)
        if WRITE_COPY:
            tl.store(copy_ptr + offsets, h.to(copy_ptr.dtype.element_ty), mask=valid)
        if PARTS:
            # The same number of parts as a GEMM writes, with the sum in the first: readers compile only once.
            h = stored.to(ACC)
            p = tl.arange(0, PARTS_BLOCK)[None, :]
            parts = tl.where(p == 0, tl.sum(h * h, axis=1)[:, None], 0.0)
            p_sums = sumsq_ptr + r.to(tl.int64)[:, None] * PARTS + p
            tl.store(p_sums, parts, mask=(r < rows)[:, None] & (p < PARTS))


_OUT = Outputs()


@dataclass(frozen=True)
class Norm:
    """An RMSNorm at the end of a network call."""

    weight: Tensor | None  # [D]
    eps: float


def start(
    x: Tensor | None,
    y: Tensor | None,
    z: Tensor | None,
    *,
    norm: Norm | None = None,
    write_normed: bool = False,
    write_next: bool = True,
    count: Tensor | None = None,
    outputs: Outputs = _OUT,
) -> tuple[Stream | None, Tensor | None, Tensor | None]:
    """Launch the kernel on contiguous [B, L, D] tensors of one dtype; x requires y.

    Args:
        count: Number of packed rows, int32 [1].
        outputs: Output tensors; h is ``next``.

    Returns:
        The stream h, the pair x + y, and the normalised z; None for each that was not computed.
    """
    like = y if z is None else z
    assert like is not None
    cols = like.shape[-1]
    rows = like.numel() // cols
    block_c = power_of_two(cols, 16)
    block_r = 256 if target_of(like).interpreted else max(1, 1024 // block_c)
    pair = None if x is None else torch.empty_like(like)
    normed = torch.empty_like(like) if write_normed else None
    parts = sumsq_parts(cols) if write_next and outputs.write_sumsq else 0
    next, copy, sumsq = outputs.next, outputs.copy, outputs.sumsq
    if write_next:
        next = torch.empty_like(like) if next is None else next
        if outputs.copy_dtype is not None and copy is None:
            copy = torch.empty_like(like, dtype=outputs.copy_dtype)
        if outputs.write_sumsq and sumsq is None:
            wide = torch.promote_types(like.dtype, torch.float32)
            sumsq = like.new_empty((rows, parts), dtype=wide)
    launch(
        stream_kernel,
        (cdiv(rows, block_r),),
        x, y, z, None if norm is None else norm.weight, count, pair, normed, next, copy, sumsq,
        rows, cols, 0.0 if norm is None else norm.eps,
        HAS_X=x is not None,
        HAS_Y=y is not None,
        HAS_Z=z is not None,
        NORM=norm is not None,
        HAS_WEIGHT=norm is not None and norm.weight is not None,
        PACKED=count is not None,
        WRITE_NORMED=write_normed,
        WRITE_COPY=copy is not None,
        WRITE_H=write_next,
        PARTS=parts,
        PARTS_BLOCK=power_of_two(parts),
        ACC=accumulator(like.dtype),
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        warps=max(4, min(16, block_r * block_c // 256)),
    )  # fmt: skip
    return None if next is None else Stream(next, copy, sumsq), pair, normed
