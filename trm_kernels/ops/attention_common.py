"""Code shared by the attention kernels: tiles, samples, dropout, and loading of heads.

Rows of the packed projections are [R, 3, H, E]: queries, keys and values, each with all heads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trm_kernels.ops._launch import Target, accumulator, input_precision, power_of_two, target_of

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def program(L, H, BLOCK: tl.constexpr):
    """Return tile of rows, sample-and-head, sample, and head. Other grid axes than the first end at 65535."""
    tiles = tl.cdiv(L, BLOCK)
    head = tl.program_id(0) // tiles
    return tl.program_id(0) % tiles, head, head // H, head % H


@triton.jit
def sample_rows(start_ptr, b, L, PACKED: tl.constexpr):
    """Return the first row (64-bit) and the number of rows of sample b."""
    first = b.to(tl.int64) * L
    length = L
    if PACKED:
        first = tl.load(start_ptr + b).to(tl.int64)
        length = tl.load(start_ptr + b + 1) - tl.load(start_ptr + b)
    return first, length


@triton.jit
def tables_of(cos_ptr, sin_ptr, first, E: tl.constexpr, PACKED: tl.constexpr):
    """Return the RoPE tables for a sample: indexed by position, or if packed, one table row per row.

    Called only with tables, because Triton 3.6 cannot return None.
    """
    if PACKED:
        cos_ptr += first * (E // 2)
        sin_ptr += first * (E // 2)
    return cos_ptr, sin_ptr


@triton.jit
def load_head(
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
    """Load rows of one head [BL, BE] in the stored dtype, rotated if ``ROTARY``; zeros beyond L and E."""
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
def load_bias(p_bias, E: tl.constexpr, BLOCK_E: tl.constexpr, ACC: tl.constexpr):
    """Load one head's part of a bias [BE]."""
    e = tl.arange(0, BLOCK_E)
    return tl.load(p_bias + e, mask=e < E, other=0.0).to(ACC)


@triton.jit
def _rotation(rows, L, cos_ptr, sin_ptr, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Load factors [BL, BE] of a channel and its partner: x' = x cos + partner sin, with the sign in sin."""
    e = tl.arange(0, BLOCK_E)
    HALF: tl.constexpr = E // 2
    valid = (rows < L)[:, None] & (e < E)[None, :]
    table = rows.to(tl.int64)[:, None] * HALF + (e % HALF)[None, :]
    cos = tl.load(cos_ptr + table, mask=valid, other=0.0)
    sin = tl.load(sin_ptr + table, mask=valid, other=0.0)
    return cos, tl.where((e < HALF)[None, :], -sin, sin)


@triton.jit
def rotate_back(grad, rows, L, cos_ptr, sin_ptr, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Apply the transposed rotation to an accumulated gradient [BL, BE]."""
    e = tl.arange(0, BLOCK_E)
    HALF: tl.constexpr = E // 2
    partner = tl.where(e < HALF, e + HALF, tl.where(e < E, e - HALF, e))
    grad_partner = tl.gather(grad, tl.broadcast_to(partner[None, :], grad.shape), axis=1)
    cos, sin = _rotation(rows, L, cos_ptr, sin_ptr, E, BLOCK_E)
    return grad * cos - grad_partner * sin


@triton.jit
def kept(seed_ptr, call, rows, cols, head, threshold):
    """Return which attention weights [BM, BN] dropout keeps."""
    shape = rows[:, None] + cols[None, :]
    c0 = rows[:, None] + tl.zeros_like(shape)
    c1 = cols[None, :] + tl.zeros_like(shape)
    zero = tl.zeros_like(shape)
    bits, _, _, _ = tl.philox(tl.load(seed_ptr), c0, c1, zero + head, zero + call)
    return bits.to(tl.int64) >= threshold


@dataclass(frozen=True)
class Tile:
    """Number of query and key rows per program, and its schedule."""

    m: int
    n: int
    warps: int
    stages: int


#: Forward and backward tiles by element size and padded head size, chosen so that no configuration spills
#: registers or exceeds 64 KiB of shared memory on any target (the ahead-of-time tests check this).
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
    """Choose the tile of one attention kernel, by head size and dtype only, never by length."""
    if target.interpreted:
        return _INTERPRETER
    tile = (_BACKWARD if backward else _FORWARD)[dtype.itemsize][power_of_two(head_dim, 16)]
    if target.kind != "cuda":
        return replace(tile, stages=1)  # a second stage does not fit into AMD's 64 KiB
    datacenter_blackwell = isinstance(target.arch, int) and 100 <= target.arch < 120
    if datacenter_blackwell and tile == _FORWARD[2][16]:
        # Accumulators are in tensor memory but pass through registers: 4 warps spill up to 256 bytes.
        return replace(tile, warps=8, stages=1)
    if datacenter_blackwell and tile == _BACKWARD[2][64]:
        return replace(tile, warps=8)  # 4 warps spill 8 bytes in the loop, with RoPE
    return tile


@dataclass(frozen=True)
class Dropout:
    """Dropout of attention weights.

    Attributes:
        probability: Probability of dropping a weight.
        seed: Device seed, int64 [1].
        call: Index of the network call and block, so that one seed suffices for a recursion.
    """

    probability: float
    seed: Tensor | None
    call: int = 0

    @property
    def threshold(self) -> int:
        return round(self.probability * 2**32)


NO_DROPOUT = Dropout(0.0, None)


@dataclass(frozen=True)
class Samples:
    """Division of rows into samples: B x L rows, with or without a key mask, or packed rows.

    Attributes:
        batch: Number of samples B.
        length: Length L of a sample; of the longest sample if packed.
        mask: uint8 [B, L], 1 = valid, any pattern.
        ends: One past the last valid position of each sample, int32 [B].
        starts: First row of each packed sample and the end of the last, int32 [B + 1].
        count: Number of packed rows, int32 [1] (a separate tensor, so that its alignment never changes).
    """

    batch: int
    length: int
    mask: Tensor | None = None
    ends: Tensor | None = None
    starts: Tensor | None = None
    count: Tensor | None = None


@dataclass(frozen=True)
class Heads:
    """One attention call on rows of packed projections.

    Attributes:
        n_heads: Number of heads H.
        samples: Rows of each sample, which attend to each other.
        cos, sin: RoPE tables [L, E/2], or [R, E/2] for packed samples, float32 or wider.
        bias: Bias [3 D] to add to the projections, which are stored without it.
        dropout: Dropout of the attention weights.
    """

    n_heads: int
    samples: Samples
    cos: Tensor | None = None
    sin: Tensor | None = None
    bias: Tensor | None = None
    dropout: Dropout = NO_DROPOUT

    def __post_init__(self) -> None:
        assert self.bias is None or self.cos is None, "no family has both a bias and RoPE"

    @property
    def pointers(self) -> tuple[Tensor | None, ...]:
        """The kernel arguments bias, mask, ends, starts, cos, sin, seed."""
        samples = self.samples
        return (
            self.bias, samples.mask, samples.ends, samples.starts, self.cos, self.sin, self.dropout.seed,
        )  # fmt: skip

    def scalars(self, width: int) -> tuple[Any, ...]:
        """Return L, H, call, scale, threshold, 1 / (1 - p) for projections of width D."""
        dropout = self.dropout
        scale = (width // self.n_heads) ** -0.5
        return (
            self.samples.length, self.n_heads, dropout.call, scale, dropout.threshold,
            1.0 / (1.0 - dropout.probability),
        )  # fmt: skip

    def constants(self, like: Tensor, width: int, tile: Tile) -> dict[str, Any]:
        """Return constants, warps and stages of a launch on projections of width D."""
        head_dim = width // self.n_heads
        return {
            "E": head_dim,
            "HAS_BIAS": self.bias is not None,
            "HAS_MASK": self.samples.mask is not None,
            "PACKED": self.samples.starts is not None,
            "ROTARY": self.cos is not None,
            "DROPOUT": self.dropout.probability > 0.0,
            "PRECISION": input_precision(like.dtype),
            "ACC": accumulator(like.dtype),
            "BLOCK_M": tile.m,
            "BLOCK_N": tile.n,
            "BLOCK_E": power_of_two(head_dim, 16),
            "warps": tile.warps,
            "stages": tile.stages,
        }

    def tile(self, like: Tensor, width: int, *, backward: bool) -> Tile:
        """Return the tile of a launch on projections of width D."""
        return choose_tile(width // self.n_heads, like.dtype, backward, target_of(like))


def mask_ends(mask: Tensor) -> Tensor:
    """Return one past the last valid position of each sample, int32 [B]; ``mask`` is uint8 [B, L]."""
    positions = torch.arange(1, mask.shape[1] + 1, dtype=torch.int32, device=mask.device)
    return (mask * positions).amax(dim=1).to(torch.int32)
