"""Parses puzzles typed by a user, and checks them and their answers."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm_trm.choices import Task
from llm_trm.data.puzzles import maze, sudoku
from llm_trm.data.puzzles.sudoku_text import SIZES, grids, only_cells
from llm_trm.errors import InputError
from llm_trm.text import split_lines

_REMEDY = (
    "enter a Sudoku of 16, 36 or 81 cells (digits, and 0 . _ - * for blanks), or the rows of a maze "
    f"(characters {maze.CHARSET!r})"
)

#: Maximum number of guesses when counting solutions. A hard puzzle took 160 guesses (0.1 s), this many take
#: about a second, and a puzzle without a solution was not finished after 20,000.
_GUESSES = 3000


@dataclass(frozen=True)
class Question:
    """A puzzle to solve.

    Attributes:
        task: ``"sudoku"`` or ``"maze"``.
        rows, columns: Size of the grid.
        tokens: uint8 [rows x columns], row by row.
    """

    task: Task
    rows: int
    columns: int
    tokens: Tensor

    @property
    def shape(self) -> sudoku.Shape:
        """The shape of a Sudoku."""
        return sudoku.SHAPES[self.rows]

    def note(self) -> str | None:
        """A note if the puzzle has no or several solutions; None if it has one or it is too hard to tell."""
        if self.task == "maze":
            paths = maze.count_shortest_paths(self._cells(self.tokens))
            if paths > 1:
                return "the maze has several shortest paths; any of them is valid"
            return None if paths else "the maze has no solution: there is no path from the start to the goal"
        grid = sudoku.tokens_grid(self.tokens.tolist())
        if fault := sudoku.grid_fault(grid, self.shape):
            return f"the puzzle has no solution: {fault}"
        solutions = _count_solutions(grid)
        if solutions == 0:
            return "the puzzle has no solution"
        return "the puzzle has several solutions; any of them is valid" if solutions == 2 else None

    def fault(self, answer: Tensor) -> str | None:
        """Describe why an answer, tokens [rows x columns], is invalid; None if it is valid."""
        if self.task == "maze":
            return maze.solution_fault(self._cells(self.tokens), self._cells(answer))
        puzzle, solution = (sudoku.tokens_grid(tokens.tolist()) for tokens in (self.tokens, answer))
        return sudoku.solution_fault(puzzle, solution, self.shape)

    def _cells(self, tokens: Tensor) -> NDArray[np.uint8]:
        return tokens.numpy().astype(np.uint8).reshape(self.rows, self.columns)


def read_questions(text: str, source: str) -> list[Question]:
    """Parse the puzzles in a text: Sudokus, each on one or several lines, or mazes separated by empty lines.

    What ``llm-trm solve`` draws reads as the grid that it shows.

    Args:
        text: The text. Whitespace between the cells of a Sudoku is ignored, and so are the rules, bars and
            comments of :mod:`~llm_trm.data.puzzles.sudoku_text`. In a maze, spaces are open cells.
        source: Name of the source for messages.

    Raises:
        InputError: The text contains something else; the message gives the location.
    """
    lines = split_lines(text)
    if re.match(r"[\ufeff\s]*(\{|\[(?!Puzzle\]|State\]))", text):
        raise InputError(
            f"{source} looks like JSON. ARC tasks only work with `llm-trm eval puzzle`: {_REMEDY}"
        )
    if not any(line.strip() for line in lines):
        raise InputError(f"{source} contains no puzzle: {_REMEDY}")
    # In a maze, # is a wall; before the metadata of a Sudoku, it is the start of a comment.
    if re.search("[#SG]", text) and not only_cells(lines):
        return [_maze(block, where) for block, where in _mazes(lines, source)]
    alone = sum(map(bool, map(str.strip, lines))) == 1
    found = list(grids(lines))
    if not found:
        raise InputError(f"{source} contains no puzzle: {_REMEDY}")
    return [_sudoku(cells, source if alone else f"{source}, line {number}") for number, cells in found]


def _mazes(lines: Sequence[str], source: str) -> Iterator[tuple[str, str]]:
    start = 0
    for number, line in enumerate([*lines, ""]):
        # A line of spaces is a row of open cells.
        if line:
            continue
        if start < number:
            yield "\n".join(lines[start:number]), source if len(lines) == 1 else f"{source}, line {start + 1}"
        start = number + 1


def _maze(text: str, where: str) -> Question:
    try:
        grid = _halved(maze.parse_maze(text))
    except ValueError as error:
        raise InputError(f"{where}: {error}: {_REMEDY}") from None
    try:
        maze.count_shortest_paths(grid)
    except ValueError as error:
        raise InputError(f"{where}: {error}: use one S, one G, walls '#' and open cells ' '") from None
    rows, columns = grid.shape
    return Question("maze", rows, columns, torch.from_numpy(grid.reshape(-1)))


def _halved(grid: maze.MazeGrid) -> maze.MazeGrid:
    """The maze of a drawing that has each cell twice in a row, and so two starts; any other grid as it is."""
    left, right = grid[:, ::2], grid[:, 1::2]
    drawn = left.shape == right.shape and (left == right).all() and (grid == maze.START).sum() == 2
    return np.ascontiguousarray(left) if drawn else grid


def _sudoku(cells: str, where: str) -> Question:
    if unknown := re.search(f"[^1-9{re.escape(sudoku.BLANKS)}]", cells):
        raise InputError(f"{where}: {unknown[0]!r} is neither a digit nor a blank: {_REMEDY}")
    if len(cells) not in SIZES:
        raise InputError(f"{where}: the puzzle has {len(cells)} cells: {_REMEDY}")
    shape = sudoku.shape_of(len(cells))
    grid = [0 if cell in sudoku.BLANKS else int(cell) for cell in cells]
    for cell, digit in enumerate(grid):
        if digit > shape.size:
            raise InputError(
                f"{where}: {shape.cell_name(cell)} is {digit}: a {shape.size}x{shape.size} Sudoku has the "
                f"digits 1 to {shape.size}"
            )
    return Question("sudoku", shape.size, shape.size, torch.from_numpy(sudoku.grid_tokens(grid)))


class _GaveUp(Exception):
    pass


class _Guesses(random.Random):
    """Keeps the solver's guesses in order, and stops the solver after too many."""

    taken = 0

    def shuffle(self, x: Any, *_: Any) -> None:
        self.taken += 1
        if self.taken > _GUESSES:
            raise _GaveUp


def _count_solutions(grid: sudoku.Grid) -> int | None:
    """Number of solutions, up to 2; None if the solver needs too many guesses."""
    found = 0
    try:
        for _ in sudoku.solutions(grid, _Guesses()):
            found += 1
            if found == 2:
                break
    except _GaveUp:
        return None
    return found
