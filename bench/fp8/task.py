"""A task that a tiny network learns in a minute or two: 4x4 Sudoku, drawn on the fly.

There are 288 grids, so that whether a puzzle has one solution is a comparison with all of them. Puzzles for
testing come from grids that no training puzzle comes from.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

SIDE, BOX = 4, 2
CELLS = SIDE * SIDE
#: Values of a cell: 0 is blank.
VOCABULARY = SIDE + 1
#: Fewest and most clues of a puzzle.
CLUES = (6, 9)
#: Grids whose puzzles are for testing.
HELD_OUT = 48


def grids() -> Tensor:
    """Every complete grid, int64 [288, 16], values 1 to 4."""
    rows = list(itertools.permutations(range(1, SIDE + 1)))

    def valid(grid: tuple[tuple[int, ...], ...]) -> bool:
        columns = (set(column) for column in zip(*grid, strict=True))
        boxes = (
            {grid[top + i][left + j] for i in range(BOX) for j in range(BOX)}
            for top in range(0, SIDE, BOX)
            for left in range(0, SIDE, BOX)
        )
        return all(len(group) == SIDE for group in itertools.chain(columns, boxes))

    return torch.tensor(
        [sum(grid, ()) for grid in itertools.product(rows, repeat=SIDE) if valid(grid)], dtype=torch.int64
    )


@dataclass(frozen=True)
class Puzzles:
    """A source of puzzles: their solutions are rows of ``chosen``, each the only one among ``all``."""

    all: Tensor  # [288, 16]
    chosen: Tensor  # [C, 16]

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Puzzles with a single solution, and their solutions, int64 [count, 16] each."""
        found: list[tuple[Tensor, Tensor]] = []
        missing = count
        while missing > 0:
            tries = 3 * missing
            grid = self.chosen[torch.randint(len(self.chosen), (tries,), generator=generator)]
            clues = torch.randint(CLUES[0], CLUES[1] + 1, (tries, 1), generator=generator)
            rank = torch.rand(tries, CELLS, generator=generator).argsort(dim=1)
            puzzle = grid.masked_fill(rank >= clues, 0)
            fits = (puzzle[:, None] == self.all) | (puzzle[:, None] == 0)  # [tries, 288, 16]
            single = fits.all(dim=2).sum(dim=1) == 1
            found.append((puzzle[single], grid[single]))
            missing -= int(single.sum())
        puzzles, solutions = zip(*found, strict=True)
        return torch.cat(puzzles)[:count], torch.cat(solutions)[:count]


@functools.cache
def sources() -> tuple[Puzzles, Puzzles]:
    """Puzzles for training and for testing, of disjoint grids."""
    every = grids()
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))
    return Puzzles(every, every[order[HELD_OUT:]]), Puzzles(every, every[order[:HELD_OUT]])
