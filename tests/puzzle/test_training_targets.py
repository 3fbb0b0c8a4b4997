"""Tests of the tiny preset's results on a CPU: ``pytest -m slow tests/puzzle``; minutes each."""

from __future__ import annotations

import pytest
import torch

from bench import puzzle, puzzle_training

CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.parametrize("size, exact, minutes", [(4, 0.98, 5), (6, 0.90, 30)])
def test_sudoku_is_learned_in_time_and_halting_pays(size: int, exact: float, minutes: float) -> None:
    line = puzzle_training.train(size, 0, CPU)
    whole, _, halting = line["modes"]
    assert whole["exact"] >= exact
    assert line["seconds"] <= 60 * minutes
    assert halting["exact"] >= whole["exact"] - 0.004  # two of 500 puzzles
    assert puzzle_training.speedup(line, 2) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("case", puzzle.CASES["cpu"], ids=lambda case: case.name)
def test_a_step_is_faster_than_the_eager_official_one(case: puzzle.PuzzleCase) -> None:
    line = puzzle.run_case(case, CPU, 20.0, compiled=False)
    assert line["ratio"][puzzle.PLAIN] >= 1.3
