"""ARC tasks: grids of colours, their symmetries, and the tokens that a model sees.

A grid is uint8 [rows, columns] of colours 0 to 9, at most 30 x 30. Its tokens are the 900 cells of a 30 x 30
canvas, row by row: 0 is padding, colour c is c + 2, and 1 marks the end of the grid, directly below its last
row and to the right of its last column, if the canvas has room.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIDE = 30
COLOURS = 10
END = 1
FIRST_COLOUR = 2
VOCAB_SIZE = FIRST_COLOUR + COLOURS
DIHEDRAL = 8

#: Colours, uint8 [rows, columns].
Grid = NDArray[np.uint8]

#: Each symmetry as a view: whether to transpose the grid first, then the strides of rows and columns.
_VIEWS = (
    (False, 1, 1),
    (True, -1, 1),
    (False, -1, -1),
    (True, 1, -1),
    (False, 1, -1),
    (False, -1, 1),
    (True, 1, 1),
    (True, -1, -1),
)
#: Inverse of each dihedral symmetry. All are their own inverses, except the two quarter turns.
_INVERSE = (0, 3, 2, 1, 4, 5, 6, 7)


@dataclass(frozen=True)
class Pair:
    """A question and its answer; None if unknown."""

    input: Grid
    output: Grid | None


@dataclass(frozen=True)
class ArcTask:
    """A task: pairs that demonstrate its rule, and pairs that test it."""

    name: str
    train: tuple[Pair, ...]
    test: tuple[Pair, ...]


@dataclass(frozen=True, slots=True)
class Transform:
    """A symmetry of tasks: replaces colours, then rotates or mirrors the grid.

    Attributes:
        dihedral: 0 is the identity; 1, 2 and 3 rotate counter-clockwise by that many quarter turns; 4 swaps
            left and right; 5 swaps top and bottom; 6 transposes; 7 mirrors along the other diagonal.
        colours: The new value of each colour, a permutation of 0 to 9.
    """

    dihedral: int = 0
    colours: tuple[int, ...] = tuple(range(COLOURS))

    def __post_init__(self) -> None:
        if not 0 <= self.dihedral < DIHEDRAL or sorted(self.colours) != list(range(COLOURS)):
            raise ValueError(f"{self} is not a symmetry: it needs 0 to 7, and a permutation of 0 to 9")

    @property
    def swaps_sides(self) -> bool:
        """Whether rows become columns."""
        return _VIEWS[self.dihedral][0]

    def apply(self, grid: Grid) -> Grid:
        """The transformed grid; its sides may be swapped."""
        return turn(np.frombuffer(bytes(self.colours), np.uint8)[grid], self.dihedral)


def invert(grid: Grid, transform: Transform) -> Grid:
    """The inverse of ``transform.apply``."""
    colours: Grid = np.argsort(transform.colours).astype(np.uint8)
    return colours[turn(grid, _INVERSE[transform.dihedral])]


def turn(grid: Grid, dihedral: int) -> Grid:
    """Apply one of the eight symmetries listed in :class:`Transform`."""
    transposed, down, right = _VIEWS[dihedral]
    return (grid.T if transposed else grid)[::down, ::right]


def encode(grid: Grid, canvas: NDArray[np.uint8], row: int = 0, column: int = 0) -> None:
    """Write a grid's tokens onto ``canvas``, uint8 [30, 30] of padding, with its corner at (row, column)."""
    below, right = row + grid.shape[0], column + grid.shape[1]
    canvas[row:below, column:right] = grid + FIRST_COLOUR
    canvas[below : below + 1, column:right] = END
    canvas[row:below, right : right + 1] = END


def crop(tokens: NDArray[np.integer]) -> list[Grid]:
    """Extract the grids of predictions, or of questions, from the upper left corner.

    A model is not trained on cells outside the answer, so a grid is the largest rectangle of colours in that
    corner, with the fewest rows in case of a tie. The grid is empty if the corner is not a colour.

    Args:
        tokens: [N, 900] or [N, 30, 30].
    """
    canvases = np.asarray(tokens).reshape(-1, SIDE, SIDE)
    other = (canvases < FIRST_COLOUR) | (canvases >= VOCAB_SIZE)
    run = np.where(other.any(2), other.argmax(2), SIDE)
    widths = np.minimum.accumulate(run, 1)
    areas = widths * np.arange(1, SIDE + 1)
    last = areas.argmax(1)
    return [
        (canvas[: row + 1, : width[row]] - FIRST_COLOUR).astype(np.uint8)
        if width[row]
        else np.zeros((0, 0), dtype=np.uint8)
        for canvas, row, width in zip(canvases, last, widths, strict=True)
    ]
