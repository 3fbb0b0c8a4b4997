"""Preparation of weights for the GEMMs: stacked, scaled by the preceding norm, and rounded once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from trm_kernels.ops._launch import accumulator, cdiv, launch


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
        # Views of `out` are aligned where vector loads matter: there, rows are multiples of 16 elements.
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


def stack(weights: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """Concatenate weights [N_i, K] to one [N, K] in ``dtype``."""
    if len(weights) == 1:
        return weights[0].to(dtype)
    return torch.cat([weight.to(dtype) for weight in weights])


def aligned(weight: Tensor) -> Tensor:
    """Pad ``weight`` [N, K] in memory, so that rows start at multiples of 16 elements.

    A token mixer's K is the sequence length. On sm_90, rows of 97 elements are loaded without asynchronous
    copies, and every product waits for them.
    """
    return F.pad(weight, (0, -weight.shape[1] % 16))[:, : weight.shape[1]]
