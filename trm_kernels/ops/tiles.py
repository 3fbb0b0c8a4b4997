"""Tile shapes and schedules of the GEMM kernels: a heuristic by shape, dtype and device."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch

from trm_kernels.ops._launch import Target, cdiv


class Activation(IntEnum):
    """What the epilogue applies; ``*_BACKWARD`` turns the gradient of the activation into that of its input."""

    NONE = 0
    GELU = 1
    SWIGLU = 2
    GELU_BACKWARD = 3
    SWIGLU_BACKWARD = 4

    @property
    def gated(self) -> bool:
        return self in (Activation.SWIGLU, Activation.SWIGLU_BACKWARD)

    @property
    def backward(self) -> bool:
        return self in (Activation.GELU_BACKWARD, Activation.SWIGLU_BACKWARD)


@dataclass(frozen=True)
class Tile:
    """Tile shape and schedule of one GEMM launch."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


#: 16-bit tiles, largest first. 64 rows is the least that sm_90's wgmma takes.
_TILES_16BIT = (
    Tile(128, 128, 64, 8, 3),
    Tile(64, 128, 64, 4, 3),
    Tile(64, 64, 64, 4, 4),
    Tile(64, 32, 64, 4, 4),
)
#: Two accumulators (SwiGLU), the operands of a derivative, or the scattered addresses of a transposed output
#: do not fit beside a 128 x 128 accumulator: the gradient of SwiGLU spills 944 bytes a thread on sm_90, a
#: transposed residual 104 on sm_80.
_TILES_NARROW = (Tile(128, 64, 64, 8, 3), Tile(64, 64, 64, 4, 3), Tile(64, 32, 64, 4, 4))
#: float32 multiplies outside the tensor cores unless TF32 is allowed, so its tiles are small.
_TILES_FLOAT32 = (Tile(64, 64, 16, 4, 2), Tile(32, 32, 16, 4, 2))
_TILE_INTERPRETER = Tile(64, 64, 64, 1, 1)


def choose_tile(
    M: int,
    N: int,
    batch: int,
    activation: Activation,
    operand: torch.dtype,
    target: Target,
    *,
    transposed: bool = False,
) -> Tile:
    """The largest tile that still gives every processor one; a heuristic, by shape only."""
    if target.interpreted:
        return _TILE_INTERPRETER
    narrow = activation.gated or activation.backward or transposed
    tiles: tuple[Tile, ...] = _TILES_NARROW if narrow else _TILES_16BIT
    if operand == torch.float32:
        tiles = _TILES_FLOAT32
    tile = tiles[-1]
    for candidate in tiles:
        if cdiv(M, candidate.m) * cdiv(N, candidate.n) * batch >= target.processors:
            tile = candidate
            break
    # Two weight tiles and one input tile in each stage of the ring for a gated activation.
    stage = tile.k * (tile.m + tile.n * (2 if activation == Activation.SWIGLU else 1)) * operand.itemsize
    stages = min(tile.stages, max(1, target.shared_memory // stage - 1)) if target.kind == "cuda" else 2
    return Tile(tile.m, tile.n, tile.k, tile.warps, stages)
