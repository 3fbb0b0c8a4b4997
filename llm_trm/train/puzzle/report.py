"""What puzzle training tells of a run, and to whom."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class PuzzlePlan:
    """What a run is about to do.

    Attributes:
        task: Of the puzzles.
        grid: Rows and columns.
        training, evaluated: Puzzles.
        repeated: Test puzzles that are training puzzles too.
        parameters: Numbers of the model that the paper counts.
        steps: Of the whole run.
        batch_size: Samples in flight.
        start: Steps that a resumed run has behind it.
        device: In words.
    """

    task: str
    grid: tuple[int, int]
    training: int
    evaluated: int
    repeated: int
    parameters: int
    steps: int
    batch_size: int
    start: int
    device: str


@dataclass(frozen=True)
class PuzzleResult:
    """How a run ended.

    Attributes:
        best: Checkpoint of the highest accuracy on test puzzles, or the last where none was evaluated.
        history: A record an evaluation: ``step``, ``seconds`` of training so far, the means ``train`` since
            the record before (``samples_per_second`` among them), and ``test``, a
            :class:`~llm_trm.evaluate.puzzle.PuzzleScore` as a dictionary, or None.
    """

    best: Path
    history: list[dict[str, Any]]


class PuzzleReport:
    """Hears how a run goes; this one says nothing."""

    def begin(self, plan: PuzzlePlan) -> None:
        """Training begins."""

    def step(self, step: int, metrics: Mapping[str, float] | None) -> None:
        """Step ``step``, from 1, is on its way; ``metrics`` where new ones came."""

    def evaluated(self, record: Mapping[str, Any]) -> None:
        """A record as in :class:`PuzzleResult` was added."""
