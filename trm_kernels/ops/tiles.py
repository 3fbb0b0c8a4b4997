"""Route, tile shape and schedule of each GEMM: possible choices, and a heuristic by shape, dtype and device.

This module does not import Triton, so that tables of choices can be read and displayed without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch

if TYPE_CHECKING:
    from trm_kernels.ops._launch import Target


class Activation(IntEnum):
    """Activation in the epilogue; ``*_BACKWARD`` computes the gradient of the activation's input."""

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


Kernel = Literal["gemm", "stream", "activation_gradient", "norm_gradient", "weight_gradient"]
Route = Literal["triton", "library"]


# A tuple, not a dataclass: launchers create one per call, and creating a frozen dataclass takes 1 to 2 us
# more.
class Problem(NamedTuple):
    """One matrix product as a launcher describes it. Batch and sequence length determine the rows.

    Attributes:
        kernel: ``"gemm"``: C [M, N] = epilogue(A [M, K] W^T), W [N, K], over M rows.
            ``"activation_gradient"``: the same with the derivative of ``activation`` in the epilogue.
            ``"norm_gradient"``: the same with the backward of an RMSNorm over N in the epilogue.
            ``"weight_gradient"``: C [M, N] = G^T A, contracted over K rows of G [K, M] and A [K, N].
        M: Height of the output.
        N: Width of the output; of one of its two halves if ``activation`` is gated.
        K: Length of the contraction.
        batch: Number of independent products of these sizes (token mixers), else 1.
        activation: Activation in the epilogue.
        operand: Dtype of the operands.
        transposed: Whether the rows are the last axis, [B, K, M] to [B, N, M].
    """

    kernel: Kernel
    M: int
    N: int
    K: int
    batch: int
    activation: Activation
    operand: torch.dtype
    transposed: bool

    @property
    def products(self) -> int:
        """Number of matrices with the shape of W that multiply one tile of A: two (gate and up) or one."""
        return 2 if self.activation == Activation.SWIGLU else 1


@dataclass(frozen=True)
class Choice:
    """The way to compute a problem.

    Attributes:
        route: ``"triton"``, or ``"library"``: torch's matrix product, then a kernel for the epilogue.
        tile: Tile of the Triton kernel: m by n over the output and k along the contraction. For
            ``"library"``, the tile of the epilogue.
        splits: Number of parts of a weight gradient's contraction, each with its own partial sum; 1 for
            other kernels.
    """

    route: Route
    tile: Tile
    splits: int = 1


#: Kernels whose launchers support the route ``"library"``.
LIBRARY_KERNELS: frozenset[Kernel] = frozenset(("gemm", "stream", "norm_gradient", "weight_gradient"))

#: 16-bit tiles, largest first. 64 rows is the minimum for wgmma on sm_90.
_TILES_16BIT = (
    Tile(128, 128, 64, 8, 3),
    Tile(64, 128, 64, 4, 3),
    Tile(64, 64, 64, 4, 4),
    Tile(64, 32, 64, 4, 4),
)
#: Two accumulators (SwiGLU), the operands of a derivative, or the scattered addresses of a transposed output
#: do not fit into registers with a 128 x 128 accumulator: the gradient of SwiGLU spills 944 bytes per thread
#: on sm_90, a transposed residual 104 on sm_80.
_TILES_NARROW = (Tile(128, 64, 64, 8, 3), Tile(64, 64, 64, 4, 3), Tile(64, 32, 64, 4, 4))
#: Without TF32, float32 products do not use the tensor cores, so these tiles are small.
_TILES_FLOAT32 = (Tile(64, 64, 16, 4, 2), Tile(32, 32, 16, 4, 2))
_TILE_INTERPRETER = Tile(64, 64, 64, 1, 1)


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


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
    """Return the largest tile that still gives every processor a tile; a heuristic by shape only."""
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
    # For a gated activation, each stage of the ring buffer holds two weight tiles and one input tile.
    stage = tile.k * (tile.m + tile.n * (2 if activation == Activation.SWIGLU else 1)) * operand.itemsize
    stages = min(tile.stages, max(1, target.shared_memory // stage - 1)) if target.kind == "cuda" else 2
    return Tile(tile.m, tile.n, tile.k, tile.warps, stages)


#: Minimum rows per split: with fewer, writing and adding partial sums costs more than the extra programs
#: save.
_SPLIT_ROWS = 512


def heuristic(problem: Problem, target: Target) -> Choice:
    """Return the choice for a problem that was not measured."""
    kernel, M, N, _, batch, activation, operand, transposed = problem
    if kernel == "weight_gradient":
        return _split_heuristic(problem, target)
    # Like the derivative of an activation, the norm's backward reads two more tiles in its epilogue. A
    # float32 stream and its addend spill 344 bytes per thread with a 128 x 128 accumulator (sm_90).
    narrow = transposed or kernel in ("norm_gradient", "stream")
    return Choice("triton", choose_tile(M, N, batch, activation, operand, target, transposed=narrow))


def _split_heuristic(problem: Problem, target: Target) -> Choice:
    """Return the largest tile that gives every processor a program after the rows are split."""
    if target.interpreted:
        return Choice("triton", _TILE_INTERPRETER)
    limit = max(1, problem.K // _SPLIT_ROWS)
    tile = choose_tile(problem.M, problem.N, limit, Activation.NONE, problem.operand, target)
    wanted = target.processors // programs(problem, Choice("triton", tile))
    splits = 1
    while 2 * splits <= min(wanted, limit):
        splits *= 2
    return Choice("triton", tile, splits)


def programs(problem: Problem, choice: Choice) -> int:
    """Return the number of programs of the launch that computes the product."""
    tile = choice.tile
    return cdiv(problem.M, tile.m) * cdiv(problem.N, tile.n) * problem.batch * choice.splits


def shared_memory(problem: Problem, tile: Tile) -> int:
    """Return the bytes of shared memory for the stages of a tile: the minimum for one program."""
    return tile.stages * tile.k * (tile.m + tile.n * problem.products) * problem.operand.itemsize


#: ``tl.dot`` needs at least 16 by 16 elements; row sums are written for every 32 columns.
_MIN_TILE = {"m": 16, "n": 32, "k": 16}
_MAX_TILE = {"m": 256, "n": 256, "k": 256}
_WARPS = (1, 2, 4, 8, 16)
_MAX_STAGES = 8
_MAX_SPLITS = 128
#: Maximum float32 accumulators per thread: of its 255 registers, addresses and operands need some.
_MAX_ACCUMULATORS = 192


def flaw(problem: Problem, choice: Choice, target: Target) -> str | None:
    """Return why ``choice`` cannot be launched for ``problem`` on ``target``, or None."""
    if choice.route not in get_args(Route):
        return f"unknown route {choice.route!r}"
    if choice.route == "library" and problem.kernel not in LIBRARY_KERNELS:
        return f"{problem.kernel} has no library route"
    tile = choice.tile
    for axis, minimum in _MIN_TILE.items():
        size = getattr(tile, axis)
        if size & (size - 1) or not minimum <= size <= _MAX_TILE[axis]:
            return f"tile {axis} {size} is not a power of two from {minimum} to {_MAX_TILE[axis]}"
    if tile.warps not in _WARPS:
        return f"{tile.warps} warps are not one of {_WARPS}"
    if not 1 <= tile.stages <= _MAX_STAGES:
        return f"{tile.stages} stages are not in 1 to {_MAX_STAGES}"
    if not 1 <= choice.splits <= (_MAX_SPLITS if problem.kernel == "weight_gradient" else 1):
        return f"{choice.splits} splits are not possible for {problem.kernel}"
    lanes = 64 if target.kind == "hip" else 32
    if tile.m * tile.n * problem.products > _MAX_ACCUMULATORS * tile.warps * lanes:
        return f"{tile.warps} warps cannot hold the accumulators of {tile.m} x {tile.n}"
    needed = shared_memory(problem, tile)
    if needed > target.shared_memory:
        return f"the stages need {needed} bytes, more than the {target.shared_memory} of shared memory"
    return None
