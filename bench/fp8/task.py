"""A task that a tiny network learns in one or two minutes: 4x4 Sudoku, sampled on the fly.

There are only 288 grids, so a comparison with all of them shows whether a puzzle has a unique solution. Test
puzzles come from grids that are not used for training puzzles.
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
#: Minimum and maximum number of clues of a puzzle.
CLUES = (6, 9)
#: Number of grids for test puzzles.
HELD_OUT = 48


def grids() -> Tensor:
    """All complete grids, int64 [288, 16], values 1 to 4."""
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
    """A source of puzzles whose solutions are rows of ``chosen`` and unique among ``all``."""

    all: Tensor  # [288, 16]
    chosen: Tensor  # [C, 16]

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Sample puzzles with a unique solution, and their solutions, int64 [count, 16] each."""
        found: list[tuple[Tensor, Tensor]] = []
        missing = count
        while missing > 0:
            attempts = 3 * missing
            grid = self.chosen[torch.randint(len(self.chosen), (attempts,), generator=generator)]
            clues = torch.randint(CLUES[0], CLUES[1] + 1, (attempts, 1), generator=generator)
            rank = torch.rand(attempts, CELLS, generator=generator).argsort(dim=1)
            puzzle = grid.masked_fill(rank >= clues, 0)
            fits = (puzzle[:, None] == self.all) | (puzzle[:, None] == 0)  # [attempts, 288, 16]
            single = fits.all(dim=2).sum(dim=1) == 1
            found.append((puzzle[single], grid[single]))
            missing -= int(single.sum())
        puzzles, solutions = zip(*found, strict=True)
        return torch.cat(puzzles)[:count], torch.cat(solutions)[:count]


@functools.cache
def sources() -> tuple[Puzzles, Puzzles]:
    """Puzzles for training and for testing, from disjoint grids."""
    every = grids()
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))
    return Puzzles(every, every[order[HELD_OUT:]]), Puzzles(every, every[order[:HELD_OUT]])
