"""What phase 3 reports: its plan, records of training and evaluation, and the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_trm.data.problems import Question


@dataclass(frozen=True)
class Problems:
    """Questions with answers that can be graded; the two parts share no question.

    Attributes:
        training, held_out: The parts.
        dropped: Questions left out because their answer cannot be compared with.
    """

    training: list[Question]
    held_out: list[Question]
    dropped: int


@dataclass(frozen=True)
class Phase3Plan:
    """What a run is about to do, for its report.

    Attributes:
        problems: Of both parts.
        parameters: Numbers that are trained, and those that are frozen.
        prompts: Problems of an optimizer step, of all processes.
        group_size: Completions of each.
        steps: Of the whole run.
        start: Step to go on from.
        device: In words.
    """

    problems: Problems
    parameters: tuple[int, int]
    prompts: int
    group_size: int
    steps: int
    start: int
    device: str


@dataclass(frozen=True)
class Accuracy:
    """Greedy answers to the held-out problems.

    Attributes:
        correct, total: Right answers, and all.
    """

    correct: int
    total: int

    @property
    def share(self) -> float:
        """In [0, 1]."""
        return self.correct / max(self.total, 1)


@dataclass(frozen=True)
class Phase3Result:
    """How a run ended.

    Attributes:
        history: Records in order, each with ``step``: of training with ``reward``, of held-out problems with
            ``eval_accuracy``.
        before, after: Held-out accuracy of the model at the run's start and at its end.
    """

    history: Sequence[Mapping[str, Any]]
    before: Accuracy
    after: Accuracy


class Phase3Report:
    """Hears how a run goes; this one says nothing. Only the main process calls it."""

    def begin(self, plan: Phase3Plan) -> None:
        """Training begins."""

    def step(self, step: int) -> None:
        """Step ``step``, from 1, is done."""

    def record(self, record: Mapping[str, Any]) -> None:
        """A new record of the history; see :class:`Phase3Result`."""

    def end(self) -> None:
        """Training has ended, or failed."""
