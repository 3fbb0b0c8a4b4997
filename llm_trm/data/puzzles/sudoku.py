"""Sudoku: grids, a solver, and puzzles made from nothing.

A grid is a sequence of size² ints, row by row: 0 is a blank, 1 to size are digits. Where people read of
rows, columns and cells, these are counted from 1.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain, islice, permutations, product
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_trm.errors import InputError

Grid = tuple[int, ...]

#: Tokens of a puzzle are its cells plus this, since token 0 is padding: a blank is 1, digit d is d + 1.
TOKEN_OFFSET = 1
#: What stands for a blank in text.
BLANKS = "0._-*"

#: Puzzles in a row that were known already, or had too many clues, before :func:`generate` gives up.
_FRUITLESS_TRIES = 2000


@dataclass(frozen=True)
class Shape:
    """A kind of Sudoku.

    Attributes:
        size: Digits, and rows and columns of the grid.
        box_rows, box_columns: Cells of a box from top to bottom and from left to right.
    """

    size: int
    box_rows: int
    box_columns: int

    @property
    def cells(self) -> int:
        """Cells of a grid, size²."""
        return self.size * self.size

    @property
    def vocab_size(self) -> int:
        """Tokens: padding, blank and the digits."""
        return self.size + 2

    @property
    def square_boxes(self) -> bool:
        """Whether a transposed grid is one of this shape."""
        return self.box_rows == self.box_columns

    @cached_property
    def units_of(self) -> tuple[tuple[int, int, int], ...]:
        """Row, column and box of each cell, each numbered among all 3 x size units."""
        size, boxes_across = self.size, self.size // self.box_columns
        return tuple(
            (
                row,
                size + column,
                2 * size + row // self.box_rows * boxes_across + column // self.box_columns,
            )
            for row in range(size)
            for column in range(size)
        )

    def unit_name(self, unit: int) -> str:
        """``row 3``, ``column 1`` or ``box 2`` for a unit's number in :attr:`units_of`."""
        kind, index = divmod(unit, self.size)
        return f"{('row', 'column', 'box')[kind]} {index + 1}"

    def cell_name(self, cell: int) -> str:
        """``cell (2, 4)``: row and column."""
        row, column = divmod(cell, self.size)
        return f"cell ({row + 1}, {column + 1})"


#: By size.
SHAPES = {4: Shape(4, 2, 2), 6: Shape(6, 2, 3), 9: Shape(9, 3, 3)}

_BY_CELLS = {shape.cells: shape for shape in SHAPES.values()}


def shape_of(cells: int) -> Shape:
    """The shape of a grid with so many cells.

    Raises:
        InputError: There is none.
    """
    if cells not in _BY_CELLS:
        raise InputError(f"a grid of {cells} cells is no Sudoku: give 16, 36 or 81 (4x4, 6x6 or 9x9)")
    return _BY_CELLS[cells]


def grid_tokens(grids: npt.ArrayLike) -> npt.NDArray[np.uint8]:
    """Tokens of grids, of any shape: a blank becomes 1 and digit d becomes d + 1."""
    return (np.asarray(grids) + TOKEN_OFFSET).astype(np.uint8)


def tokens_grid(tokens: Sequence[int]) -> Grid:
    """The grid of one sequence of tokens, ints or a tensor [L]; padding becomes a blank."""
    return tuple(max(int(token) - TOKEN_OFFSET, 0) for token in tokens)


def grid_fault(grid: Sequence[int], shape: Shape) -> str | None:
    """What breaks the rules in ``grid``, blanks aside, in words; None if nothing does."""
    seen: list[int] = [0] * (3 * shape.size)
    for cell, digit in enumerate(grid):
        if not digit:
            continue
        if not 0 < digit <= shape.size:
            return f"{shape.cell_name(cell)} holds {digit}, which is no digit from 1 to {shape.size}"
        for unit in shape.units_of[cell]:
            if seen[unit] >> digit & 1:
                return f"{shape.unit_name(unit)} holds {digit} twice"
            seen[unit] |= 1 << digit
    return None


def solution_fault(puzzle: Sequence[int], solution: Sequence[int], shape: Shape) -> str | None:
    """Why ``solution`` does not solve ``puzzle``, in words; None if it does."""
    for name, grid in (("puzzle", puzzle), ("solution", solution)):
        if len(grid) != shape.cells:
            return f"the {name} has {len(grid)} cells where {shape.cells} belong"
    for cell, (clue, digit) in enumerate(zip(puzzle, solution, strict=True)):
        if not digit:
            return f"{shape.cell_name(cell)} is blank"
        if clue and clue != digit:
            return f"{shape.cell_name(cell)} contradicts its clue"
    return grid_fault(solution, shape)


def valid_solution(puzzle: Sequence[int], solution: Sequence[int]) -> bool:
    """Whether ``solution`` solves ``puzzle``; InputError if the puzzle has no known size."""
    return solution_fault(puzzle, solution, shape_of(len(puzzle))) is None


def solve(grid: Sequence[int]) -> Grid | None:
    """A solution, the only one of a proper puzzle; None if there is none.

    Raises:
        InputError: ``grid`` has no known size.
    """
    return next(solutions(grid), None)


def count_solutions(grid: Sequence[int], limit: int = 2) -> int:
    """How many solutions ``grid`` has; counting stops at ``limit``.

    Raises:
        InputError: ``grid`` has no known size.
    """
    return sum(1 for _ in islice(solutions(grid), limit))


def solutions(grid: Sequence[int], rng: random.Random | None = None) -> Iterator[Grid]:
    """Every solution; where it has to guess a digit, it tries them in the order of ``rng``.

    Raises:
        InputError: ``grid`` has no known size.
    """
    shape = shape_of(len(grid))
    if grid_fault(grid, shape) is not None:
        return
    bits = [1 << digit >> 1 for digit in grid]
    for solved in _search(shape, bits, _used(shape, bits), rng):
        yield tuple(bit.bit_length() for bit in solved)


def _used(shape: Shape, bits: Sequence[int]) -> list[int]:
    """The digits that each unit holds, as a mask."""
    used = [0] * (3 * shape.size)
    for units, bit in zip(shape.units_of, bits, strict=True):
        for unit in units:
            used[unit] |= bit
    return used


def _search(shape: Shape, bits: list[int], used: list[int], rng: random.Random | None) -> Iterator[list[int]]:
    """Solutions of a grid of one-bit masks (blank 0) that breaks no rule; changes ``bits`` and ``used``."""
    units_of = shape.units_of
    every_digit = (1 << shape.size) - 1
    blanks = [cell for cell, bit in enumerate(bits) if not bit]
    while blanks:
        left, choices = [], []
        for cell in blanks:
            row, column, box = units_of[cell]
            free = every_digit & ~(used[row] | used[column] | used[box])
            if free & (free - 1):
                left.append(cell)
                choices.append(free)
            elif free:
                bits[cell] = free
                used[row] |= free
                used[column] |= free
                used[box] |= free
            else:
                return
        if len(left) < len(blanks):
            blanks = left
            continue
        alone = _only_places(used, [units_of[cell] for cell in blanks], choices, every_digit)
        if alone is None:
            return
        if any(alone):
            for cell, free in zip(blanks, choices, strict=True):
                row, column, box = units_of[cell]
                bit = free & (alone[row] | alone[column] | alone[box])
                if not bit:
                    continue
                # Two digits that can only go here, or one that has just been given to a neighbour.
                if bit & (bit - 1) or bit & (used[row] | used[column] | used[box]):
                    return
                bits[cell] = bit
                used[row] |= bit
                used[column] |= bit
                used[box] |= bit
            blanks = [cell for cell in blanks if not bits[cell]]
            continue
        fewest = min(range(len(blanks)), key=lambda index: choices[index].bit_count())
        cell, free = blanks[fewest], choices[fewest]
        guesses = [1 << digit for digit in range(shape.size) if free >> digit & 1]
        if rng is not None:
            rng.shuffle(guesses)
        for guess in guesses:
            yield from _with(shape, bits, used, cell, guess, rng)
        return
    yield bits


def _with(
    shape: Shape, bits: list[int], used: list[int], cell: int, bit: int, rng: random.Random | None
) -> Iterator[list[int]]:
    """Solutions with ``bit`` at the blank ``cell``; leaves its arguments as they are."""
    bits, used = bits.copy(), used.copy()
    bits[cell] = bit
    for unit in shape.units_of[cell]:
        used[unit] |= bit
    return _search(shape, bits, used, rng)


def _only_places(
    used: list[int], units: list[tuple[int, int, int]], choices: list[int], every_digit: int
) -> list[int] | None:
    """For each unit, the missing digits that a single cell of it can take; None if one has no place."""
    once, twice = used.copy(), used.copy()
    for (row, column, box), free in zip(units, choices, strict=True):
        twice[row] |= once[row] & free
        once[row] |= free
        twice[column] |= once[column] & free
        once[column] |= free
        twice[box] |= once[box] & free
        once[box] |= free
    if any(mask != every_digit for mask in once):
        return None
    return [every_digit & ~mask for mask in twice]


def full_grid(shape: Shape, rng: random.Random) -> Grid:
    """A random grid without blanks; every one can come."""
    return next(solutions((0,) * shape.cells, rng))


def dig(solution: Sequence[int], clues: int, rng: random.Random) -> Grid:
    """Blank cells of a full grid, in random order, while its solution stays the only one.

    Stops at ``clues`` clues, or with more where no further one can go: the puzzle is minimal then.
    """
    shape = shape_of(len(solution))
    bits = [1 << digit >> 1 for digit in solution]
    used = _used(shape, bits)
    order = list(range(shape.cells))
    rng.shuffle(order)
    left = shape.cells
    for cell in order:
        if left <= clues:
            break
        bit = bits[cell]
        units = shape.units_of[cell]
        bits[cell] = 0
        for unit in units:
            used[unit] ^= bit
        # The puzzle had one solution with the clue, so a second one without it has another digit here.
        others = ((1 << shape.size) - 1) & ~(bit | used[units[0]] | used[units[1]] | used[units[2]])
        while others:
            other = others & -others
            others ^= other
            if next(_with(shape, bits, used, cell, other, None), None) is not None:
                bits[cell] = bit
                for unit in units:
                    used[unit] |= bit
                break
        else:
            left -= 1
    return tuple(bit.bit_length() for bit in bits)


def generate(
    shape: Shape, count: int, clues: tuple[int, int] | None = None, seed: int = 0
) -> Iterator[tuple[Grid, Grid]]:
    """``count`` puzzles with a single solution each, and these solutions.

    No two are the same under the symmetries of :func:`canonical`; of 9x9 puzzles, no two are equal.

    Args:
        shape: 4x4, 6x6 or 9x9.
        count: How many.
        clues: Fewest and most clues, each number as likely where it can be reached; None for puzzles from
            which no clue can be taken.
        seed: Same seed, same puzzles.

    Raises:
        InputError: There are not so many, or they are too rare.
    """
    rng = random.Random(seed)
    known: set[Grid] = set()
    tries = 0
    while len(known) < count:
        wanted, most = (0, shape.cells) if clues is None else (rng.randint(*clues), clues[1])
        solution = full_grid(shape, rng)
        puzzle = dig(solution, wanted, rng)
        form = identity(puzzle, shape)
        tries += 1
        if form not in known and sum(map(bool, puzzle)) <= most:
            known.add(form)
            tries = 0
            yield puzzle, solution
        elif tries >= _FRUITLESS_TRIES:
            kind = "with as few clues as can be" if clues is None else f"with {clues[0]} to {clues[1]} clues"
            raise InputError(
                f"{len(known)} different {shape.size}x{shape.size} puzzles {kind} were found, of {count} "
                f"asked for, and no other in {tries} tries: ask for fewer, or allow more clues"
            )


def identity(puzzle: Grid, shape: Shape) -> Grid:
    """What equivalent puzzles share: :func:`canonical`, but the puzzle itself for 9x9.

    A 9x9 grid has 3,359,232 spatial symmetries, too many to go through for each puzzle: two 9x9 puzzles
    count as different unless they are equal cell by cell.
    """
    return puzzle if shape.size == 9 else canonical(puzzle, shape)


def canonical(grid: Sequence[int], shape: Shape) -> Grid:
    """One grid for all that symmetries turn into each other, for 4x4 and 6x6.

    Of the grids that the spatial symmetries give, with digits relabelled in order of first appearance, it is
    the smallest: by the cells that hold clues first, then by the clues.

    Raises:
        ValueError: The grid is 9x9.
    """
    orders = symmetries(shape)
    cells = np.asarray(grid, dtype=np.uint8)
    # The clues' cells as a number leave one symmetry or a few, so that few grids have to be relabelled.
    patterns = (cells != 0)[orders] @ _powers(shape.cells)
    forms = cells[orders[patterns == patterns.min()]]
    return min(_relabelled(form) for form in np.unique(forms, axis=0).tolist())


@cache
def _powers(cells: int) -> npt.NDArray[np.floating[Any]]:
    # float64 holds every sum of different powers below 2^53 exactly, and its product is a fast one (BLAS).
    return 2.0 ** np.arange(cells - 1, -1, -1)


def _relabelled(grid: list[int]) -> Grid:
    labels = {0: 0}
    return tuple(labels.setdefault(digit, len(labels)) for digit in grid)


@cache
def symmetries(shape: Shape) -> npt.NDArray[np.intp]:
    """The spatial symmetries [S, cells]: of each, the cells in their new order. 128 for 4x4, 3456 for 6x6.

    Raises:
        ValueError: The shape is 9x9, whose table would take gigabytes.
    """
    if shape.size == 9:
        raise ValueError("9x9 grids have too many symmetries to list")
    rows = line_orders(shape.size, shape.box_rows)
    columns = line_orders(shape.size, shape.box_columns)
    moved = rows[:, None, :, None] * shape.size + columns[None, :, None, :]
    if shape.square_boxes:
        moved = np.stack([moved, moved.swapaxes(2, 3)])
    return moved.reshape(-1, shape.cells)


@cache
def line_orders(lines: int, group: int) -> npt.NDArray[np.intp]:
    """Orders of rows that keep the rows of each band together [O, lines]; or of columns in stacks.

    Args:
        lines: Rows of the grid.
        group: Rows of a band.
    """
    bands = range(lines // group)
    inside = product(permutations(range(group)), repeat=len(bands))
    return np.array(
        [
            list(chain.from_iterable((band * group + line for line in within[band]) for band in order))
            for order, within in product(permutations(bands), inside)
        ],
        dtype=np.intp,
    )


def number_of_clues(grids: npt.NDArray[Any]) -> npt.NDArray[np.intp]:
    """Clues of each of grids [..., L]."""
    return np.count_nonzero(grids, axis=-1)
