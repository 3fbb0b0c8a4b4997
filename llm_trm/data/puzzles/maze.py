"""Mazes: their tokens, shortest paths, and checks of answers.

A maze is a grid of tokens, uint8 [rows, columns], with one start and one goal. Steps go to the four
neighbours, never through a wall or off the grid. The length of a path is its number of steps, one more than
the number of cells between start and goal. The answer is the maze with these cells of a shortest path marked.
"""

from __future__ import annotations

from math import isqrt

import numpy as np
from numpy.typing import NDArray

#: Character i is token i + 1; 0 is padding.
CHARSET = "# SGo"
WALL, OPEN, START, GOAL, PATH = range(1, len(CHARSET) + 1)
VOCAB_SIZE = len(CHARSET) + 1

#: Tokens, uint8 [rows, columns].
MazeGrid = NDArray[np.uint8]

_TOKENS = {character: token for token, character in enumerate(CHARSET, 1)}
_HARD_SIZE, _HARD_STEPS = 30, 111
_NO_PATH = "there is no path from the start to the goal"


def default_min_path(rows: int, columns: int) -> int:
    """Minimum path length of generated mazes: 111 for 30 x 30, as in Maze-Hard, scaled by the cell count."""
    return max(2, _HARD_STEPS * rows * columns // _HARD_SIZE**2)


def parse_maze(text: str) -> MazeGrid:
    """Parse a grid with one row per line, or a square grid with all cells on one line.

    Spaces are open cells, even at the end of a line.

    Raises:
        ValueError: The grid is ragged or has an unknown character; the message gives the location.
    """
    lines = text.replace("\r\n", "\n").strip("\n").split("\n")
    if len(lines) == 1:
        (cells,) = lines
        side = isqrt(len(cells))
        if side * side != len(cells):
            raise ValueError(f"the grid is ragged: {len(cells)} cells on one line do not form a square")
        lines = [cells[row * side : (row + 1) * side] for row in range(side)]
    if not lines:
        raise ValueError("there is no grid")
    for number, line in enumerate(lines, 1):
        if len(line) != len(lines[0]):
            raise ValueError(f"the grid is ragged: line {number} has {len(line)} cells, not {len(lines[0])}")
        if unknown := set(line) - _TOKENS.keys():
            raise ValueError(f"unknown character {min(unknown)!r}: a cell must be one of {CHARSET!r}")
    return np.array([[_TOKENS[cell] for cell in line] for line in lines], dtype=np.uint8)


def format_maze(grid: MazeGrid) -> str:
    """Format a grid with one row per line, for :func:`parse_maze`. Padding becomes a question mark."""
    characters = "?" + CHARSET
    return "\n".join("".join(characters[token] for token in row) for row in grid.tolist())


def maze_fault(maze: MazeGrid) -> str | None:
    """Describe the fault of a maze; None if it has one start, one goal and a path between them."""
    fault = _ends_fault(maze)
    if fault is None and _steps_to_goal(maze) is None:
        fault = _NO_PATH
    return fault


def shortest_path(maze: MazeGrid) -> int:
    """Length of a shortest path from start to goal.

    Raises:
        ValueError: The maze is invalid (see :func:`maze_fault`).
    """
    fault = _ends_fault(maze)
    steps = None if fault else _steps_to_goal(maze)
    if steps is None:
        raise ValueError(fault or _NO_PATH)
    return steps


def count_shortest_paths(maze: MazeGrid, limit: int = 2) -> int:
    """Number of shortest paths from start to goal, up to ``limit``; 0 if there is no path.

    Raises:
        ValueError: The maze does not have exactly one start and one goal.
    """
    if fault := _ends_fault(maze):
        raise ValueError(fault)
    cells, columns = walled(maze != WALL)
    _, counts = distances(cells, columns, _index(maze, START), limit)
    return counts[_index(maze, GOAL)]


def solution_fault(maze: MazeGrid, answer: MazeGrid) -> str | None:
    """Describe the fault of an answer; None if it marks exactly the cells of a shortest path."""
    if fault := _ends_fault(maze):
        return fault
    if (steps := _steps_to_goal(maze)) is None:
        return _NO_PATH
    if answer.shape != maze.shape:
        return f"the answer has {_size(answer)} cells, the maze has {_size(maze)}"
    marked = answer == PATH
    if (marked & (maze == WALL)).any():
        return "the path goes through a wall"
    if (marked & (maze != OPEN)).any():
        return "the path covers the start or the goal"
    if (changed := (answer != maze) & ~marked).any():
        row, column = np.argwhere(changed)[0]
        return f"row {row + 1}, column {column + 1} of the answer differs from the maze"
    walk = np.where(marked | (maze == START) | (maze == GOAL), maze, np.uint8(WALL))
    walked = _steps_to_goal(walk)
    if walked is None:
        return "the path is broken: its cells do not lead from the start to the goal"
    if walked > steps:
        return f"the path is not a shortest one: it takes {walked} steps instead of {steps}"
    if (extra := int(marked.sum()) - (steps - 1)) > 0:
        return f"{extra} marked cell{'s are' if extra > 1 else ' is'} not on the path"
    return None


def walled(passable: NDArray[np.bool_]) -> tuple[bytearray, int]:
    """Cells row by row, 1 if passable, with a border of walls; and the number of columns with the border."""
    bordered = np.pad(passable, 1)
    return bytearray(bordered.astype(np.uint8).tobytes()), bordered.shape[1]


def distances(cells: bytearray, columns: int, start: int, limit: int = 2) -> tuple[list[int], list[int]]:
    """Breadth-first search from one cell.

    Args:
        cells, columns: Result of :func:`walled`.
        start: Index into ``cells``.
        limit: Maximum number of paths to count.

    Returns:
        For every cell, the length of a shortest path from ``start`` (-1: no path), and the number of them.
    """
    steps, counts = [-1] * len(cells), [0] * len(cells)
    steps[start], counts[start] = 0, 1
    around = (-columns, -1, 1, columns)
    frontier, step = [start], 0
    while frontier:
        step += 1
        reached = []
        for cell in frontier:
            paths = counts[cell]
            for offset in around:
                other = cell + offset
                if not cells[other]:
                    continue
                if steps[other] < 0:
                    steps[other] = step
                    counts[other] = paths
                    reached.append(other)
                elif steps[other] == step:
                    counts[other] = min(counts[other] + paths, limit)
        frontier = reached
    return steps, counts


def _ends_fault(maze: MazeGrid) -> str | None:
    if maze.max(initial=WALL) > GOAL or maze.min(initial=WALL) < WALL:
        return "the maze has cells other than walls, open cells, a start and a goal"
    for token, name in ((START, "start"), (GOAL, "goal")):
        if (number := int((maze == token).sum())) != 1:
            return f"the maze has {number or 'no'} {name}{'s' * (number > 1)}"
    return None


def _steps_to_goal(maze: MazeGrid) -> int | None:
    cells, columns = walled(maze != WALL)
    steps, _ = distances(cells, columns, _index(maze, START))
    found = steps[_index(maze, GOAL)]
    return None if found < 0 else found


def _index(maze: MazeGrid, token: int) -> int:
    row, column = np.argwhere(maze == token)[0]
    return int((row + 1) * (maze.shape[1] + 2) + column + 1)


def _size(grid: MazeGrid) -> str:
    return " x ".join(map(str, grid.shape))
