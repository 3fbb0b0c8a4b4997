"""Random mazes with one shortest path."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import numpy as np

from llm_trm.data.puzzles.maze import (
    GOAL,
    OPEN,
    PATH,
    START,
    WALL,
    MazeGrid,
    distances,
)
from llm_trm.errors import InputError
from llm_trm.memory import require_memory

#: Walls are opened up to one in so many cells, which gives a maze its loops.
_CELLS_AN_OPENING = 60
#: Cells are dug behind a random one instead of the newest up to this often: what shortens the dead ends.
_MOST_BRANCHING = 0.3
_TRIES = 1000


class MazeGenerator:
    """Draws mazes whose shortest path is the only one of its length.

    Corridors are dug one cell wide, so that a tree of them fills the grid; then some walls are opened. The
    start is a random cell, and so is the goal, among those that one shortest path of enough steps leads to.

    Args:
        rows, columns: Of a grid, at least 3.
        min_path: Fewest steps from start to goal.
        seed: Of all draws.

    Raises:
        InputError: A grid smaller than 3 x 3, or ``min_path`` below 2.
    """

    def __init__(self, rows: int, columns: int, min_path: int, seed: int | str) -> None:
        if min(rows, columns) < 3:
            raise InputError(f"mazes need at least 3 x 3 cells, not {rows} x {columns}")
        if min_path < 2:
            raise InputError(f"a path needs at least 2 steps to have a cell to mark, not {min_path}")
        self._rows, self._columns, self._min_path = rows, columns, min_path
        self._random = Random(seed)
        self._stride = columns + 2
        self._inside = [
            row * self._stride + column for row in range(1, rows + 1) for column in range(1, columns + 1)
        ]
        self._is_inside = bytearray((rows + 2) * self._stride)
        for cell in self._inside:
            self._is_inside[cell] = 1

    def draw(self) -> tuple[MazeGrid, MazeGrid]:
        """A maze and its answer, uint8 [rows, columns] each.

        Raises:
            InputError: None was found in many tries: the path is to be too long for the grid.
        """
        for _ in range(_TRIES):
            cells = self._dig()
            self._open_walls(cells)
            if ends := self._ends(cells):
                return self._grids(cells, *ends)
        raise InputError(
            f"{_TRIES} mazes of {self._rows} x {self._columns} cells had no single shortest path of "
            f"{self._min_path} steps or more: ask for a shorter one, or larger mazes"
        )

    def _dig(self) -> bytearray:
        draw = self._random.random
        around = self._around()
        branching = draw() * _MOST_BRANCHING
        start = self._random.choice(self._inside)
        cells = bytearray(len(self._is_inside))
        cells[start] = 1
        ends = [start]
        while ends:
            if draw() < branching:
                place = int(draw() * len(ends))
                ends[place], ends[-1] = ends[-1], ends[place]
            cell = ends[-1]
            # A cell with one open neighbour joins no two corridors.
            free = [
                other
                for offset in around
                if self._is_inside[other := cell + offset]
                and not cells[other]
                and sum([cells[other + step] for step in around]) == 1
            ]
            if free:
                chosen = free[int(draw() * len(free))]
                cells[chosen] = 1
                ends.append(chosen)
            else:
                ends.pop()
        return cells

    def _open_walls(self, cells: bytearray) -> None:
        number = int(self._random.random() * (len(self._inside) // _CELLS_AN_OPENING + 1))
        walls = [cell for cell in self._inside if not cells[cell] and self._divides(cells, cell)]
        for cell in self._random.sample(walls, min(number, len(walls))):
            cells[cell] = 1

    def _divides(self, cells: bytearray, cell: int) -> bool:
        across = cells[cell - 1] and cells[cell + 1]
        along = cells[cell - self._stride] and cells[cell + self._stride]
        return bool(across or along)

    def _ends(self, cells: bytearray) -> tuple[int, int, list[int]] | None:
        start = self._random.choice([cell for cell in self._inside if cells[cell]])
        steps, counts = distances(cells, self._stride, start)
        if max(steps) < self._min_path:
            # Ends a longest path of a tree, and with a few loops nearly one.
            start = max(self._inside, key=steps.__getitem__)
            steps, counts = distances(cells, self._stride, start)
        goals = [cell for cell in self._inside if steps[cell] >= self._min_path and counts[cell] == 1]
        return (start, self._random.choice(goals), steps) if goals else None

    def _grids(self, cells: bytearray, start: int, goal: int, steps: list[int]) -> tuple[MazeGrid, MazeGrid]:
        maze: MazeGrid = np.where(np.frombuffer(cells, np.uint8), OPEN, WALL).astype(np.uint8)
        maze[start], maze[goal] = START, GOAL
        answer = maze.copy()
        cell = goal
        while steps[cell] > 1:
            cell = next(cell + offset for offset in self._around() if steps[cell + offset] == steps[cell] - 1)
            answer[cell] = PATH
        return self._within(maze), self._within(answer)

    def _within(self, cells: MazeGrid) -> MazeGrid:
        inner: MazeGrid = cells.reshape(self._rows + 2, self._stride)[1:-1, 1:-1].copy()
        return inner

    def _around(self) -> tuple[int, int, int, int]:
        return -self._stride, -1, 1, self._stride


def generate_mazes(
    rows: int,
    columns: int,
    counts: dict[str, int],
    *,
    min_path: int,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> dict[str, list[tuple[MazeGrid, MazeGrid]]]:
    """Mazes of several splits; no two of them, in any split, are equal up to rotation and reflection.

    The first split gets the same mazes whatever the numbers of the others are: name the held-out one first.

    Args:
        rows, columns, min_path: As :class:`MazeGenerator` takes them.
        counts: Mazes of each split.
        seed: Of all draws; each split has a stream of its own.
        progress: Called with 1 after every maze.

    Raises:
        InputError: The grid is too small for the path, or for so many different mazes.
    """
    wanted = sum(counts.values())
    require_memory(3 * rows * columns * wanted, f"{wanted:,} mazes", "ask for fewer, or for smaller mazes")
    seen: set[bytes] = set()
    drawn: dict[str, list[tuple[MazeGrid, MazeGrid]]] = {}
    for split, count in counts.items():
        generator = MazeGenerator(rows, columns, min_path, f"{seed} {split}")
        mazes = drawn[split] = []
        repeated = 0
        while len(mazes) < count:
            maze, answer = generator.draw()
            if (key := symmetry_class(maze)) in seen:
                repeated += 1
                if repeated > _TRIES:
                    raise InputError(
                        f"mazes of {rows} x {columns} cells repeat themselves after {len(seen)} different "
                        "ones: ask for fewer, or for larger mazes"
                    )
                continue
            repeated = 0
            seen.add(key)
            mazes.append((maze, answer))
            if progress is not None:
                progress(1)
    return drawn


def symmetry_class(maze: MazeGrid) -> bytes:
    """The same bytes for a maze and all that are turned or mirrored from it, and for no others."""
    turned = [np.rot90(maze, quarter) for quarter in range(4)]
    both = turned + [grid.T for grid in turned]
    keys: list[bytes] = [b"%d " % len(grid) + grid.tobytes() for grid in both]
    return min(keys)


def distinct(mazes: list[tuple[MazeGrid, MazeGrid]]) -> list[tuple[MazeGrid, MazeGrid]]:
    """The first of each group of mazes that are equal up to rotation and reflection, in their order."""
    first: dict[bytes, tuple[MazeGrid, MazeGrid]] = {}
    for maze, answer in mazes:
        first.setdefault(symmetry_class(maze), (maze, answer))
    return list(first.values())
