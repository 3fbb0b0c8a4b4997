"""Sudokus from external sources, and checks of their solutions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from math import isfinite
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_trm.data.puzzles.sudoku import Shape, grid_fault, solution_fault, solutions
from llm_trm.errors import InputError
from llm_trm.ranges import shown

#: Wraps an iterable with the given number of items to show progress.
Progress = Callable[[Iterable[Any], int], Iterable[Any]]

#: Number of rows to check at a time: enough for numpy to be fast, and a few megabytes.
_CHUNK = 50_000


def untracked(items: Iterable[Any], _total: int) -> Iterable[Any]:
    """A :data:`Progress` that shows nothing."""
    return items


@dataclass(frozen=True)
class SudokuRows:
    """Rows of a file or a data set: N puzzles of the same size.

    Attributes:
        source: Name of the source for messages.
        shape: Shape of all puzzles.
        puzzles, solutions: Digits, 0 for a blank, uint8 [N, L]; a missing solution is all blank.
        numbers: Number of each row in its source, from 1 and without headers; [N].
        ratings: Difficulty ratings as given by the source; objects [N], or None.
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
        """The rows selected by indices or a mask."""
        return SudokuRows(
            self.source,
            self.shape,
            self.puzzles[indices],
            self.solutions[indices],
            self.numbers[indices],
            None if self.ratings is None else self.ratings[indices],
        )

    def rated(self, lowest: float) -> SudokuRows:
        """Rows with a rating of at least ``lowest``.

        Raises:
            InputError: There are no ratings, a rating is not a number, or all ratings are lower.
        """
        if self.ratings is None:
            raise InputError(f"{self.source} has no column rating: omit --min-rating")
        ratings = np.array([self._rating(index) for index in range(len(self))])
        if ratings.max() < lowest:
            raise InputError(
                f"{self.source} has no puzzle rated {lowest:g} or more: use a --min-rating of at most "
                f"{ratings.max():g}"
            )
        return self.take(ratings >= lowest)

    def _rating(self, index: int) -> float:
        assert self.ratings is not None
        given = self.ratings[index]
        with suppress(TypeError, ValueError, OverflowError):
            # An array, of a list in the file, may be converted with no more than a warning.
            if not isinstance(given, (bool, np.ndarray)) and isfinite(rating := float(given)):
                return rating
        fault = f"the rating {shown(given)} is not a number"
        raise row_error(self.source, self.numbers[index], fault)


def row_error(source: str, number: int, fault: str) -> InputError:
    """An error about a row, counted from 1."""
    return InputError(f"{source}, row {number}: {fault}; correct or remove the row")


def verified(rows: SudokuRows, *, trust: bool = False, progress: Progress = untracked) -> SudokuRows:
    """Check that each row has a correct and unique solution, and fill in missing solutions.

    Args:
        rows: The rows to check.
        trust: Assume that solutions are unique. Searching for a second one takes about a millisecond for a
            9x9 puzzle.
        progress: Shows the progress of rows that need a search.

    Raises:
        InputError: A row fails a check; the message gives the number of the first.
    """
    missing = ~rows.solutions.any(1)
    faulty = np.flatnonzero(~missing & ~_solved(rows))
    if len(faulty):
        index = faulty[0]
        fault = solution_fault(rows.puzzles[index].tolist(), rows.solutions[index].tolist(), rows.shape)
        raise row_error(rows.source, rows.numbers[index], f"the solution is wrong: {fault}")
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
    """Whether each solution matches its clues and the rules; [N]."""
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
