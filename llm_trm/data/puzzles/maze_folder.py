"""Writes folders of mazes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm_trm.data.puzzles.dataset import PuzzleInfo, PuzzleSplit, write_puzzles
from llm_trm.data.puzzles.maze import PATH, VOCAB_SIZE
from llm_trm.data.puzzles.maze_files import Mazes


def write_mazes(folder: Path, splits: Mapping[str, Mazes], facts: Mapping[str, Any]) -> PuzzleInfo:
    """Write mazes and answers, all of the same size, as a folder of puzzles.

    ``facts`` are saved with the minimum, mean and maximum path length of each non-empty split.

    Raises:
        InputError: The folder is not writable.
    """
    rows, columns = next(maze.shape for mazes in splits.values() for maze, _ in mazes)
    steps = {name: path_lengths(mazes) for name, mazes in splits.items() if mazes}
    info = PuzzleInfo("maze", rows, columns, VOCAB_SIZE, facts={**facts, "steps": steps})
    write_puzzles(folder, info, {name: _split(mazes, rows * columns) for name, mazes in splits.items()})
    return info


def path_lengths(mazes: Mazes) -> dict[str, float]:
    """``min``, ``mean`` and ``max`` of the path lengths in the answers."""
    steps = [int((answer == PATH).sum()) + 1 for _, answer in mazes]
    return {"min": min(steps), "mean": round(sum(steps) / len(steps), 1), "max": max(steps)}


def _split(mazes: Mazes, cells: int) -> PuzzleSplit:
    grids = np.array(mazes, dtype=np.uint8).reshape(len(mazes), 2, cells)
    inputs, labels = torch.from_numpy(grids).unbind(1)
    return PuzzleSplit(inputs.contiguous(), labels.contiguous(), torch.zeros(len(mazes), dtype=torch.int32))
