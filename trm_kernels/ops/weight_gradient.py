"""Weight gradients over the rows of several steps at once, accumulated in float32 without atomics.

    dW[n, k] = sum over steps and rows of G[step, row, n] A[step, row, k]

This is one product over the concatenated steps of a recursion, or over as many steps as fit into memory,
instead of one accumulating product per step. Rows are split among programs. Each split has its own buffer, to
which later launches add, and the buffers are summed once in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trm_kernels.ops._launch import accumulator, cdiv, input_precision, launch, target_of
from trm_kernels.ops.dispatch import choose
from trm_kernels.ops.tiles import Activation, Problem, heuristic


@triton.jit
def _row_range(count_ptr, steps, rows, split, splits, PACKED: tl.constexpr, BLOCK_R: tl.constexpr):
    """Return rows per step, row blocks per step, and the range of blocks, over all steps, of this split."""
    if PACKED:
        rows = tl.load(count_ptr)
    blocks = tl.cdiv(rows, BLOCK_R)
    share = tl.cdiv(steps * blocks, splits)
    first = split * share
    return rows, blocks, first, min(first + share, steps * blocks)


@triton.jit
def weight_gradient_kernel(
    g_ptr,
    a_ptr,
    out_ptr,
    count_ptr,
    splits,
    steps,
    rows,
    N,
    K,
    g_step,
    g_row,
    g_col,
    a_step,
    a_row,
    a_col,
    ACCUMULATE: tl.constexpr,
    PACKED: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    tiles_k = tl.cdiv(K, BLOCK_K)
    tiles = tl.cdiv(N, BLOCK_N) * tiles_k
    split = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    n = (tile // tiles_k) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    k = (tile % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)  # [BK]
    r = tl.arange(0, BLOCK_R)  # [BR]
    in_n = n < N
    in_k = k < K
    rows, blocks, first, last = _row_range(count_ptr, steps, rows, split, splits, PACKED, BLOCK_R)
    valid = in_n[:, None] & in_k[None, :]
    p_out = out_ptr + split.to(tl.int64) * N * K + n.to(tl.int64)[:, None] * K + k[None, :]
    if ACCUMULATE:
        acc = tl.load(p_out, mask=valid, other=0.0)
    else:
        acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=ACC)
    for block in range(first, last):
        step = (block // blocks).to(tl.int64)
        row = (block % blocks) * BLOCK_R + r
        in_r = row < rows
        row = row.to(tl.int64)
        p_g = g_ptr + step * g_step + row[:, None] * g_row + n[None, :] * g_col  # [BR, BN]
        p_a = a_ptr + step * a_step + row[:, None] * a_row + k[None, :] * a_col  # [BR, BK]
        b_g = tl.load(p_g, mask=in_r[:, None] & in_n[None, :], other=0.0)
        b_a = tl.load(p_a, mask=in_r[:, None] & in_k[None, :], other=0.0)
        acc = tl.dot(tl.trans(b_g), b_a, acc, input_precision=PRECISION, out_dtype=ACC)
    tl.store(p_out, acc, mask=valid)


@triton.jit
def column_sum_kernel(
    g_ptr,
    out_ptr,
    count_ptr,
    splits,
    steps,
    rows,
    N,
    ACCUMULATE: tl.constexpr,
    PACKED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    split = tl.program_id(0) % splits
    n = (tl.program_id(0) // splits) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    stride = rows
    rows, blocks, first, last = _row_range(count_ptr, steps, rows, split, splits, PACKED, BLOCK_R)
    acc = tl.zeros((BLOCK_N,), dtype=ACC)
    for block in range(first, last):
        row = (block % blocks) * BLOCK_R + r
        offsets = ((block // blocks).to(tl.int64) * stride + row)[:, None] * N + n[None, :]
        valid = (row < rows)[:, None] & (n < N)[None, :]
        acc += tl.sum(tl.load(g_ptr + offsets, mask=valid, other=0.0).to(ACC), axis=0)
    p_out = out_ptr + split * N + n
    if ACCUMULATE:
        acc += tl.load(p_out, mask=n < N, other=0.0)
    tl.store(p_out, acc, mask=n < N)


def _library_product(g: Tensor, a: Tensor) -> Tensor:
    """Compute ``g^T a`` [N, K] in float32 with torch."""
    if g.dtype in (torch.float32, torch.float64):
        return g.t() @ a
    return torch.mm(g.t(), a, out_dtype=torch.float32)


class WeightGradient:
    """The float32 gradient of one matrix [N, K], summed over launches."""

    def __init__(self, count: Tensor | None = None) -> None:
        self.count = count
        self._partial: Tensor | None = None

    def add(self, g: Tensor, a: Tensor, *, transposed: bool = False) -> None:
        """Add the product over the steps and rows of G [steps, rows, N] and A [steps, rows, K].

        If ``transposed``, rows are the last axis: [steps, N, rows] and [steps, K, rows].
        """
        if transposed:
            g, a = g.transpose(1, 2), a.transpose(1, 2)
        steps, rows, N = g.shape
        K = a.shape[2]
        target = target_of(g)
        problem = Problem("weight_gradient", N, K, steps * rows, 1, Activation.NONE, g.dtype, transposed)
        choice = choose(problem, target)
        if choice.route == "library" and (self.count is not None or transposed):
            # The library route supports neither packed rows nor rows in the last axis.
            choice = heuristic(problem, target)
        if choice.route == "library":
            product = _library_product(g.reshape(-1, N), a.reshape(-1, K))
            if self._partial is None:
                self._partial = product[None]
            else:
                self._partial[0].add_(product)  # an earlier chunk may have been split
            return
        tile = choice.tile
        splits = choice.splits if self._partial is None else self._partial.shape[0]
        accumulate = self._partial is not None
        if self._partial is None:
            wide = torch.promote_types(g.dtype, torch.float32)
            self._partial = g.new_empty((splits, N, K), dtype=wide)
        launch(
            weight_gradient_kernel,
            (cdiv(N, tile.m) * cdiv(K, tile.n) * splits,),
            g, a, self._partial, self.count, splits, steps, rows, N, K,
            *g.stride(), *a.stride(),
            ACCUMULATE=accumulate,
            PACKED=self.count is not None,
            ACC=accumulator(g.dtype),
            PRECISION=input_precision(g.dtype),
            BLOCK_N=tile.m,
            BLOCK_K=tile.n,
            BLOCK_R=tile.k,
            warps=tile.warps,
            stages=tile.stages,
        )  # fmt: skip

    @property
    def total(self) -> Tensor:
        """The gradient [N, K]."""
        assert self._partial is not None
        return self._partial[0] if self._partial.shape[0] == 1 else self._partial.sum(0)


class ColumnSum:
    """The float32 gradient of one bias [N], summed over launches."""

    def __init__(self, count: Tensor | None = None) -> None:
        self.count = count
        self._partial: Tensor | None = None

    def add(self, g: Tensor) -> None:
        """Add the rows of a contiguous gradient [steps, rows, N]."""
        steps, rows, N = g.shape
        interpreted = target_of(g).interpreted
        splits = 1 if interpreted else 32
        accumulate = self._partial is not None
        if self._partial is None:
            wide = torch.promote_types(g.dtype, torch.float32)
            self._partial = g.new_empty((splits, N), dtype=wide)
        block_n, block_r = (256, 256) if interpreted else (64, 64)
        launch(
            column_sum_kernel,
            (cdiv(N, block_n) * splits,),
            g, self._partial, self.count, splits, steps, rows, N,
            ACCUMULATE=accumulate,
            PACKED=self.count is not None,
            ACC=accumulator(g.dtype),
            BLOCK_N=block_n,
            BLOCK_R=block_r,
            warps=4,
        )  # fmt: skip

    def add_total(self, total: Tensor) -> None:
        """Add a sum [N] that another kernel computed."""
        self._partial = total[None] if self._partial is None else self._partial + total

    @property
    def total(self) -> Tensor:
        """The gradient [N]."""
        assert self._partial is not None
        return self._partial[0] if self._partial.shape[0] == 1 else self._partial.sum(0)
