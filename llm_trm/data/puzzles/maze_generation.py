"""Generates random mazes with a unique shortest path."""

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

#: At most one wall per this many cells is opened, which creates loops.
_CELLS_PER_OPENING = 60
#: Maximum probability of digging from a random cell instead of the newest one, which shortens dead ends.
_MAX_BRANCHING = 0.3
_MAX_ATTEMPTS = 1000


class MazeGenerator:
    """Generates mazes with a unique shortest path.

    The generator digs corridors one cell wide until a tree of them fills the grid, then opens some walls. The
    start is a random cell. The goal is a random cell among those with a unique shortest path of at least
    ``min_path`` steps.

    Args:
        rows, columns: Size of the grid, at least 3 each.
        min_path: Minimum path length from start to goal.
        seed: Random seed.

    Raises:
        InputError: The grid is smaller than 3 x 3, or ``min_path`` is less than 2.
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
        """Generate a maze and its answer, uint8 [rows, columns] each.

        Raises:
            InputError: Many attempts found none, because the path is too long for the grid.
        """
        for _ in range(_MAX_ATTEMPTS):
            cells = self._dig()
            self._open_walls(cells)
            if ends := self._ends(cells):
                return self._grids(cells, *ends)
        raise InputError(
            f"{_MAX_ATTEMPTS} mazes of {self._rows} x {self._columns} cells had no unique shortest path of "
            f"at least {self._min_path} steps: use a shorter path or larger mazes"
        )

    def _dig(self) -> bytearray:
        draw = self._random.random
        around = self._around()
        branching = draw() * _MAX_BRANCHING
        start = self._random.choice(self._inside)
        cells = bytearray(len(self._is_inside))
        cells[start] = 1
        ends = [start]
        while ends:
            if draw() < branching:
                index = int(draw() * len(ends))
                ends[index], ends[-1] = ends[-1], ends[index]
            cell = ends[-1]
            # A cell with only one open neighbour does not connect two corridors.
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
        number = int(self._random.random() * (len(self._inside) // _CELLS_PER_OPENING + 1))
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
            # The farthest cell is an end of a longest path in a tree, and nearly so with a few loops.
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
    """Generate mazes for several splits, all different up to rotation and reflection.

    The mazes of the first split do not depend on the sizes of the others, so put the held-out split first.

    Args:
        rows, columns, min_path: See :class:`MazeGenerator`.
        counts: Number of mazes per split.
        seed: Random seed; each split has its own random stream.
        progress: Called with 1 after every maze.

    Raises:
        InputError: The grid is too small for the path, or for this many different mazes.
    """
    wanted = sum(counts.values())
    require_memory(3 * rows * columns * wanted, f"{wanted:,} mazes", "use fewer or smaller mazes")
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
                if repeated > _MAX_ATTEMPTS:
                    raise InputError(
                        f"mazes of {rows} x {columns} cells repeat after {len(seen)} different ones: use "
                        "fewer or larger mazes"
                    )
                continue
            repeated = 0
            seen.add(key)
            mazes.append((maze, answer))
            if progress is not None:
                progress(1)
    return drawn


def symmetry_class(maze: MazeGrid) -> bytes:
    """A key that is equal exactly for mazes that are equal up to rotation and reflection."""
    turned = [np.rot90(maze, quarter) for quarter in range(4)]
    both = turned + [grid.T for grid in turned]
    keys: list[bytes] = [b"%d " % len(grid) + grid.tobytes() for grid in both]
    return min(keys)


def distinct(mazes: list[tuple[MazeGrid, MazeGrid]]) -> list[tuple[MazeGrid, MazeGrid]]:
    """Remove mazes that are equal to an earlier one up to rotation and reflection, keeping the order."""
    first: dict[bytes, tuple[MazeGrid, MazeGrid]] = {}
    for maze, answer in mazes:
        first.setdefault(symmetry_class(maze), (maze, answer))
    return list(first.values())
