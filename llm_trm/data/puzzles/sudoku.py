"""Sudoku: grids, a solver, and a puzzle generator.

A grid is a sequence of size² ints, row by row: 0 is a blank, and 1 to size are digits. Messages count rows,
columns and cells from 1.
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
#: Characters for a blank in text.
BLANKS = "0._-*"

#: Consecutive duplicates, or puzzles with too many clues, after which :func:`generate` gives up.
_MAX_FAILURES = 2000


@dataclass(frozen=True)
class Shape:
    """A kind of Sudoku.

    Attributes:
        size: Number of digits, and of rows and columns of the grid.
        box_rows, box_columns: Height and width of a box in cells.
    """

    size: int
    box_rows: int
    box_columns: int

    @property
    def cells(self) -> int:
        """Number of cells of a grid, size²."""
        return self.size * self.size

    @property
    def vocab_size(self) -> int:
        """Number of tokens: padding, blank and the digits."""
        return self.size + 2

    @property
    def square_boxes(self) -> bool:
        """Whether boxes are square, so that a transposed grid has the same shape."""
        return self.box_rows == self.box_columns

    @cached_property
    def units_of(self) -> tuple[tuple[int, int, int], ...]:
        """Row, column and box of each cell, as indices of the 3 x size units."""
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
        """Name of a unit in :attr:`units_of`: ``row 3``, ``column 1`` or ``box 2``."""
        kind, index = divmod(unit, self.size)
        return f"{('row', 'column', 'box')[kind]} {index + 1}"

    def cell_name(self, cell: int) -> str:
        """Name of a cell by row and column: ``cell (2, 4)``."""
        row, column = divmod(cell, self.size)
        return f"cell ({row + 1}, {column + 1})"


#: Shapes by size.
SHAPES = {4: Shape(4, 2, 2), 6: Shape(6, 2, 3), 9: Shape(9, 3, 3)}

_BY_CELLS = {shape.cells: shape for shape in SHAPES.values()}


def shape_of(cells: int) -> Shape:
    """The shape of a grid with this number of cells.

    Raises:
        InputError: There is no such shape.
    """
    if cells not in _BY_CELLS:
        raise InputError(f"a grid of {cells} cells is not a Sudoku: use 16, 36 or 81 (4x4, 6x6 or 9x9)")
    return _BY_CELLS[cells]


def grid_tokens(grids: npt.ArrayLike) -> npt.NDArray[np.uint8]:
    """Tokens of grids of any shape: a blank becomes 1 and digit d becomes d + 1."""
    return (np.asarray(grids) + TOKEN_OFFSET).astype(np.uint8)


def tokens_grid(tokens: Sequence[int]) -> Grid:
    """The grid of a sequence of tokens, ints or a tensor [L]; padding becomes a blank."""
    return tuple(max(int(token) - TOKEN_OFFSET, 0) for token in tokens)


def grid_fault(grid: Sequence[int], shape: Shape) -> str | None:
    """Describe the first broken rule in ``grid``, ignoring blanks; None if there is none."""
    seen: list[int] = [0] * (3 * shape.size)
    for cell, digit in enumerate(grid):
        if not digit:
            continue
        if not 0 < digit <= shape.size:
            return f"{shape.cell_name(cell)} is {digit}, which is not a digit from 1 to {shape.size}"
        for unit in shape.units_of[cell]:
            if seen[unit] >> digit & 1:
                return f"{shape.unit_name(unit)} contains {digit} twice"
            seen[unit] |= 1 << digit
    return None


def solution_fault(puzzle: Sequence[int], solution: Sequence[int], shape: Shape) -> str | None:
    """Describe why ``solution`` does not solve ``puzzle``; None if it does."""
    for name, grid in (("puzzle", puzzle), ("solution", solution)):
        if len(grid) != shape.cells:
            return f"the {name} has {len(grid)} cells instead of {shape.cells}"
    for cell, (clue, digit) in enumerate(zip(puzzle, solution, strict=True)):
        if not digit:
            return f"{shape.cell_name(cell)} is blank"
        if clue and clue != digit:
            return f"{shape.cell_name(cell)} contradicts its clue"
    return grid_fault(solution, shape)


def valid_solution(puzzle: Sequence[int], solution: Sequence[int]) -> bool:
    """Whether ``solution`` solves ``puzzle``. Raises InputError if the size of the puzzle is unknown."""
    return solution_fault(puzzle, solution, shape_of(len(puzzle))) is None


def solve(grid: Sequence[int]) -> Grid | None:
    """A solution, which is unique for a proper puzzle; None if there is none.

    Raises:
        InputError: The size of ``grid`` is unknown.
    """
    return next(solutions(grid), None)


def count_solutions(grid: Sequence[int], limit: int = 2) -> int:
    """Number of solutions of ``grid``, up to ``limit``.

    Raises:
        InputError: The size of ``grid`` is unknown.
    """
    return sum(1 for _ in islice(solutions(grid), limit))


def solutions(grid: Sequence[int], rng: random.Random | None = None) -> Iterator[Grid]:
    """Yield every solution. If the solver must guess a digit, it tries them in an order shuffled by ``rng``.

    Raises:
        InputError: The size of ``grid`` is unknown.
    """
    shape = shape_of(len(grid))
    if grid_fault(grid, shape) is not None:
        return
    bits = [1 << digit >> 1 for digit in grid]
    for solved in _search(shape, bits, _used(shape, bits), rng):
        yield tuple(bit.bit_length() for bit in solved)


def _used(shape: Shape, bits: Sequence[int]) -> list[int]:
    """Bit mask of the digits in each unit."""
    used = [0] * (3 * shape.size)
    for units, bit in zip(shape.units_of, bits, strict=True):
        for unit in units:
            used[unit] |= bit
    return used


def _search(shape: Shape, bits: list[int], used: list[int], rng: random.Random | None) -> Iterator[list[int]]:
    """Yield solutions of a valid grid of one-bit masks (blank 0). Modifies ``bits`` and ``used``."""
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
        alone = _only_cells(used, [units_of[cell] for cell in blanks], choices, every_digit)
        if alone is None:
            return
        if any(alone):
            for cell, free in zip(blanks, choices, strict=True):
                row, column, box = units_of[cell]
                bit = free & (alone[row] | alone[column] | alone[box])
                if not bit:
                    continue
                # Two digits that both fit only here, or one that was just assigned to a neighbour.
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
    """Solutions with ``bit`` at the blank ``cell``. Does not modify its arguments."""
    bits, used = bits.copy(), used.copy()
    bits[cell] = bit
    for unit in shape.units_of[cell]:
        used[unit] |= bit
    return _search(shape, bits, used, rng)


def _only_cells(
    used: list[int], units: list[tuple[int, int, int]], choices: list[int], every_digit: int
) -> list[int] | None:
    """For each unit, the missing digits that fit only one of its cells; None if a digit fits nowhere."""
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
    """A random grid without blanks; every grid is possible."""
    return next(solutions((0,) * shape.cells, rng))


def dig(solution: Sequence[int], clues: int, rng: random.Random) -> Grid:
    """Blank cells of a full grid in random order while its solution stays unique.

    Stops at ``clues`` clues, or earlier if no further clue can be removed; the puzzle is then minimal.
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
        # The solution was unique with this clue, so any second solution has another digit here.
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
    """Yield ``count`` puzzles with a unique solution, and their solutions.

    No two puzzles are equal up to the symmetries of :func:`canonical`; 9x9 puzzles are only distinct.

    Args:
        shape: 4x4, 6x6 or 9x9.
        count: Number of puzzles.
        clues: Minimum and maximum number of clues, sampled uniformly as far as possible; None for minimal
            puzzles, from which no clue can be removed.
        seed: Random seed.

    Raises:
        InputError: There are too few such puzzles, or they are too rare.
    """
    rng = random.Random(seed)
    known: set[Grid] = set()
    failures = 0
    while len(known) < count:
        wanted, most = (0, shape.cells) if clues is None else (rng.randint(*clues), clues[1])
        solution = full_grid(shape, rng)
        puzzle = dig(solution, wanted, rng)
        form = identity(puzzle, shape)
        failures += 1
        if form not in known and sum(map(bool, puzzle)) <= most:
            known.add(form)
            failures = 0
            yield puzzle, solution
        elif failures >= _MAX_FAILURES:
            kind = "with minimal clues" if clues is None else f"with {clues[0]} to {clues[1]} clues"
            raise InputError(
                f"found only {len(known)} of {count} different {shape.size}x{shape.size} puzzles {kind}, and "
                f"no others in {failures} attempts: use fewer puzzles, or allow more clues"
            )


def identity(puzzle: Grid, shape: Shape) -> Grid:
    """A key that equivalent puzzles share: :func:`canonical`, or the puzzle itself for 9x9.

    A 9x9 grid has 3,359,232 spatial symmetries, too many to try for each puzzle, so 9x9 puzzles are only
    equivalent if they are equal.
    """
    return puzzle if shape.size == 9 else canonical(puzzle, shape)


def canonical(grid: Sequence[int], shape: Shape) -> Grid:
    """The canonical representative of a 4x4 or 6x6 grid under all symmetries.

    It is the smallest of the grids that the spatial symmetries yield, with digits relabelled in order of
    first appearance, compared first by the positions of clues and then by the clues.

    Raises:
        ValueError: The grid is 9x9.
    """
    orders = symmetries(shape)
    cells = np.asarray(grid, dtype=np.uint8)
    # Minimising the clue positions, encoded as a number, first leaves few grids to relabel.
    patterns = (cells != 0)[orders] @ _powers(shape.cells)
    forms = cells[orders[patterns == patterns.min()]]
    return min(_relabelled(form) for form in np.unique(forms, axis=0).tolist())


@cache
def _powers(cells: int) -> npt.NDArray[np.floating[Any]]:
    # float64 is exact for sums of distinct powers below 2^53, and its matrix product is fast (BLAS).
    return 2.0 ** np.arange(cells - 1, -1, -1)


def _relabelled(grid: list[int]) -> Grid:
    labels = {0: 0}
    return tuple(labels.setdefault(digit, len(labels)) for digit in grid)


@cache
def symmetries(shape: Shape) -> npt.NDArray[np.intp]:
    """The spatial symmetries as permutations of cells [S, cells]; S is 128 for 4x4 and 3456 for 6x6.

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
    """Row orders that keep the rows of each band together [O, lines]; likewise for columns in stacks.

    Args:
        lines: Number of rows of the grid.
        group: Number of rows per band.
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
    """Number of clues of each grid [..., L]."""
    return np.count_nonzero(grids, axis=-1)
