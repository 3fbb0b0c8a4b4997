"""Sudokus that others made, and the checks that they must pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_trm.data.puzzles.sudoku import Shape, grid_fault, solution_fault, solutions
from llm_trm.errors import InputError

#: Wraps an iterable of so many items, to show how far it is.
Progress = Callable[[Iterable[Any], int], Iterable[Any]]

#: Rows whose solutions are checked at a time: enough for numpy, and a few megabytes.
_CHUNK = 50_000


def untracked(items: Iterable[Any], _total: int) -> Iterable[Any]:
    """A :data:`Progress` that shows nothing."""
    return items


@dataclass(frozen=True)
class SudokuRows:
    """Rows of a file or a data set: N puzzles of one size.

    Attributes:
        source: Where they come from, for messages.
        shape: Of all of them.
        puzzles, solutions: Digits, 0 for a blank, uint8 [N, L]; a solution that is not given is all blank.
        numbers: Number of each row in its source, from 1, headers not counted; [N].
        ratings: How hard each is by the source's own measure, as it stands there; objects [N], or None.
    """

    source: str
    shape: Shape
    puzzles: npt.NDArray[np.uint8]
    solutions: npt.NDArray[np.uint8]
    numbers: npt.NDArray[np.int64]
    ratings: npt.NDArray[np.object_] | None = None

    def __len__(self) -> int:
        return len(self.puzzles)

    def take(self, indices: npt.NDArray[Any]) -> SudokuRows:
        """Those rows alone; indices or a mask."""
        return SudokuRows(
            self.source,
            self.shape,
            self.puzzles[indices],
            self.solutions[indices],
            self.numbers[indices],
            None if self.ratings is None else self.ratings[indices],
        )

    def rated(self, lowest: float) -> SudokuRows:
        """Rows with at least that rating.

        Raises:
            InputError: There are no ratings, one of them is no number, or none is so high.
        """
        if self.ratings is None:
            raise InputError(f"{self.source} has no column rating: leave out --min-rating")
        ratings = np.array([self._rating(index) for index in range(len(self))])
        if ratings.max() < lowest:
            raise InputError(
                f"{self.source} has no puzzle rated {lowest:g} or more: give a --min-rating of at most "
                f"{ratings.max():g}"
            )
        return self.take(ratings >= lowest)

    def _rating(self, index: int) -> float:
        assert self.ratings is not None
        try:
            return float(self.ratings[index])
        except (TypeError, ValueError):
            fault = f"the rating {self.ratings[index]!r} is no number"
            raise row_error(self.source, self.numbers[index], fault) from None


def row_error(source: str, number: int, fault: str) -> InputError:
    """A refusal of a row, counted from 1."""
    return InputError(f"{source}, row {number}: {fault}; correct the row or take it out")


def verified(rows: SudokuRows, *, trust: bool = False, progress: Progress = untracked) -> SudokuRows:
    """The same rows, all with solutions: each solves its puzzle, and is the only one.

    Args:
        rows: Those to check; a solution that is not given is found.
        trust: Take it as given that no puzzle has a second solution. The search for one takes about a
            millisecond for a 9x9 puzzle.
        progress: Shows how far the rows are that need a search.

    Raises:
        InputError: The first row that breaks one of these rules, with its number.
    """
    missing = ~rows.solutions.any(1)
    faulty = np.flatnonzero(~missing & ~_solved(rows))
    if len(faulty):
        index = faulty[0]
        fault = solution_fault(rows.puzzles[index].tolist(), rows.solutions[index].tolist(), rows.shape)
        raise row_error(rows.source, rows.numbers[index], f"the solution is not one: {fault}")
    solved = rows.solutions.copy()
    searched = np.flatnonzero(missing) if trust else np.arange(len(rows))
    for index in progress(searched, len(searched)):
        puzzle = rows.puzzles[index].tolist()
        found = list(islice(solutions(puzzle), 1 if trust else 2))
        if len(found) == 1:
            solved[index] = found[0]
            continue
        fault = "the puzzle has more than one solution"
        if not found:
            broken = grid_fault(puzzle, rows.shape)
            fault = f"the puzzle has no solution{f': {broken}' if broken else ''}"
        raise row_error(rows.source, rows.numbers[index], fault)
    return SudokuRows(rows.source, rows.shape, rows.puzzles, solved, rows.numbers, rows.ratings)


def _solved(rows: SudokuRows) -> npt.NDArray[np.bool_]:
    """Whether each solution keeps to its clues and to the rules; [N]."""
    units_of = np.array(rows.shape.units_of)
    units = np.stack([np.flatnonzero((units_of == unit).any(1)) for unit in range(3 * rows.shape.size)])
    every_digit = (1 << rows.shape.size) - 1 << 1
    solved = np.empty(len(rows), dtype=np.bool_)
    for start in range(0, len(rows), _CHUNK):
        part = slice(start, start + _CHUNK)
        clues, digits = rows.puzzles[part], rows.solutions[part]
        held = np.bitwise_or.reduce((np.uint16(1) << digits.astype(np.uint16))[:, units], axis=2)
        solved[part] = ((clues == 0) | (clues == digits)).all(1) & (held == every_digit).all(1)
    return solved
