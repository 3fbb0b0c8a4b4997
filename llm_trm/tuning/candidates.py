"""Candidate tiles for a problem: few enough to time, starting with the heuristic's choice."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from trm_kernels.ops._launch import Target
from trm_kernels.ops.tiles import LIBRARY_KERNELS, Choice, Problem, Tile, flaw, heuristic, programs

#: (m, n, k, warps). sm_90's wgmma needs at least 64 rows; the smaller tiles are for problems with few rows.
_SHAPES_16BIT = (
    (128, 256, 64, 8),
    (256, 128, 64, 8),
    (128, 128, 64, 8),
    (128, 128, 64, 4),
    (128, 64, 64, 8),
    (128, 64, 64, 4),
    (64, 256, 64, 4),
    (64, 128, 64, 4),
    (64, 64, 64, 4),
    (64, 64, 128, 4),
    (64, 32, 64, 4),
    (64, 32, 128, 4),
    (32, 64, 64, 4),
    (32, 32, 128, 4),
)
_SHAPES_FLOAT32 = (
    (128, 128, 16, 8),
    (128, 64, 16, 8),
    (64, 64, 16, 4),
    (64, 64, 32, 4),
    (64, 32, 32, 4),
    (32, 32, 16, 4),
    (32, 32, 32, 4),
)
_STAGES = (3, 4)
_STAGES_FLOAT32 = (2, 3)
#: Range of programs per processor. Fewer leave the device idle. More are only for large tiles, because small
#: tiles would reload data that large tiles share.
_FEWEST, _MOST = 1 / 4, 16
_LARGE = 64 * 128
_SPLITS = (1, 2, 4, 8, 16, 32, 64)


def candidates(problem: Problem, target: Target) -> list[Choice]:
    """The choices to time for a problem on a target, without duplicates."""
    first = heuristic(problem, target)
    found = [first, *(choice for choice in _tiles(problem, target) if flaw(problem, choice, target) is None)]
    if problem.kernel in LIBRARY_KERNELS:
        found.append(Choice("library", first.tile))
    return list(dict.fromkeys(found))


def _tiles(problem: Problem, target: Target) -> Iterator[Choice]:
    wide = problem.operand.itemsize >= torch.float32.itemsize
    depth = 2 if problem.operand.itemsize == 1 else 1
    for m, n, k, warps in _SHAPES_FLOAT32 if wide else _SHAPES_16BIT:
        for stages in _STAGES_FLOAT32 if wide else _STAGES:
            tile = Tile(m, n, k * depth, warps, stages)
            for splits in _SPLITS if problem.kernel == "weight_gradient" else (1,):
                choice = Choice("triton", tile, splits)
                load = programs(problem, choice) / target.processors
                # Splitting serves to fill the device, so stop at two programs per processor.
                most = 2 if splits > 1 else math.inf if m * n >= _LARGE else _MOST
                if _FEWEST <= load <= most and splits * tile.k <= problem.K:
                    yield choice
