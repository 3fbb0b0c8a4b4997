"""What puzzle training reports: its plan, and the result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_trm.train.run.report import Plan


@dataclass(frozen=True, kw_only=True)
class PuzzlePlan(Plan):
    """What a run is about to do; a step is a supervision step.

    Attributes:
        task: Kind of puzzle.
        grid: Rows and columns.
        training, evaluated: Number of puzzles.
        repeated: Number of test puzzles that are training puzzles too.
        parameters: Number of parameters that the paper counts.
        batch_size: Samples in flight.
        device: Device and precision, as text.
    """

    task: str
    grid: tuple[int, int]
    training: int
    evaluated: int
    repeated: int
    parameters: int
    batch_size: int
    device: str


@dataclass(frozen=True)
class PuzzleResult:
    """How a run ended.

    Attributes:
        best: Checkpoint with the highest accuracy on test puzzles, or the last one if none was evaluated.
        history: One record per evaluation: ``step``, ``seconds`` of training so far, means ``train`` since
            the record before (``samples_per_second`` among them), and ``test``, a
            :class:`~llm_trm.evaluate.puzzle.PuzzleScore` as a dictionary, or None.
    """

    best: Path
    history: list[dict[str, Any]]
