"""Route, tile shape and schedule of each GEMM: a heuristic by shape, dtype and device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal, NamedTuple, ParamSpec, Protocol, TypeVar

import torch

from trm_kernels.ops._launch import Target, cdiv

_P = ParamSpec("_P")
_R = TypeVar("_R")


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


Kernel = Literal["gemm", "activation_gradient", "norm_gradient", "weight_gradient"]
Route = Literal["triton", "library"]


# A tuple, not a dataclass: launchers make one a call, and a frozen dataclass takes 1 to 2 us longer to make.
class Problem(NamedTuple):
    """One matrix product, as a launcher asks for it.

    Attributes:
        kernel: ``"gemm"``: C [M, N] = epilogue(A [M, K] W^T), W [N, K]. ``"activation_gradient"``: the same
            product with the derivative of ``activation`` in the epilogue. ``"norm_gradient"``: the same with
            the backward of an RMSNorm over N in the epilogue. ``"weight_gradient"``: C [N, K] = G^T A, contracted
            over the M rows of G [M, N] and A [M, K].
        M: Rows, the axis that batch and sequence length decide.
        N: Columns of the output, one of the two halves where ``activation`` is gated.
        K: The other side of the weight.
        batch: Independent products of these sizes (token mixers), else 1.
        activation: What the epilogue applies.
        operand: Dtype of the operands.
        transposed: Whether the product is taken along the sequence axis, [B, K, M] to [B, N, M].
    """

    kernel: Kernel
    M: int
    N: int
    K: int
    batch: int
    activation: Activation
    operand: torch.dtype
    transposed: bool


@dataclass(frozen=True)
class Choice:
    """How a problem is computed.

    Attributes:
        route: ``"triton"``, or ``"library"``: torch's own product, then a kernel for the epilogue.
        tile: Tile of the Triton kernel, m by n over the output and k along the contraction; unused by
            ``"library"``.
        splits: Parts that the contraction of a weight gradient is cut into, each with its own partial
            sum; 1 elsewhere.
    """

    route: Route
    tile: Tile
    splits: int = 1


#: Kernels whose launchers offer the route ``"library"``.
LIBRARY_KERNELS: frozenset[Kernel] = frozenset()

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


#: Rows of a split: fewer would cost more in writing and adding partial sums than the added programs gain.
_SPLIT_ROWS = 512


def heuristic(problem: Problem, target: Target) -> Choice:
    """The choice for a problem that nobody measured."""
    kernel, M, N, _, batch, activation, operand, transposed = problem
    if kernel == "weight_gradient":
        return _split_heuristic(problem, target)
    # The norm's backward reads two more tiles in its epilogue, as the derivative of an activation does.
    narrow = transposed or kernel == "norm_gradient"
    return Choice("triton", choose_tile(M, N, batch, activation, operand, target, transposed=narrow))


def _split_heuristic(problem: Problem, target: Target) -> Choice:
    """The largest tile that gives every processor a program once the rows are split."""
    M, N, K, operand = problem.M, problem.N, problem.K, problem.operand
    if target.interpreted:
        return Choice("triton", _TILE_INTERPRETER)
    rows = M * problem.batch
    limit = max(1, rows // _SPLIT_ROWS)
    tile = choose_tile(N, K, limit, Activation.NONE, operand, target)
    wanted = target.processors // (cdiv(N, tile.m) * cdiv(K, tile.n))
    splits = 1
    while 2 * splits <= min(wanted, limit):
        splits *= 2
    return Choice("triton", tile, splits)


@functools.lru_cache(maxsize=4096)
def _choose(problem: Problem, target: Target) -> Choice:
    return heuristic(problem, target)


def choose(problem: Problem, target: Target) -> Choice:
    """How ``problem`` is computed on ``target``; asked once by a launcher that is marked ``tunable``."""
    if _watcher is None:
        return _choose(problem, target)
    return _watcher.choose(problem, target)


class Watcher(Protocol):
    """What a tuner puts between launchers and choices."""

    def call(self, launcher: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run ``launcher``, which is about to ask for a choice."""

    def choose(self, problem: Problem, target: Target) -> Choice:
        """Answer the launcher that runs."""


_watcher: Watcher | None = None


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Let ``watcher`` see the calls of tunable launchers and answer them; for one thread at a time."""
    global _watcher
    before, _watcher = _watcher, watcher
    try:
        yield
    finally:
        _watcher = before


def tunable(launcher: Callable[_P, _R]) -> Callable[_P, _R]:
    """Mark a module-level function that asks ``choose`` once and computes the whole problem.

    A tuner records its arguments and calls it again, with other tensors of the same shapes and strides and
    another choice. So it must depend on nothing but its arguments and the choice.
    """

    @functools.wraps(launcher)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if _watcher is None:
            return launcher(*args, **kwargs)
        return _watcher.call(call, args, kwargs)

    return call
