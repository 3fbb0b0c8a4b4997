"""What phase 3 reports: its plan, and the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_trm.train.run.report import Plan


@dataclass(frozen=True, kw_only=True)
class Phase3Plan(Plan):
    """What a run is about to do; a step is an update.

    Attributes:
        training, held_out: Number of problems.
        dropped: Number of problems without an answer that can be graded.
        trained, frozen: Number of parameters.
        prompts: Problems per step, of all processes.
        group_size: Completions per problem.
        device: Devices, as text.
    """

    training: int
    held_out: int
    dropped: int
    trained: int
    frozen: int
    prompts: int
    group_size: int
    device: str


@dataclass(frozen=True)
class Accuracy:
    """Greedy answers to the held-out problems.

    Attributes:
        correct, total: Number of right answers, and of all.
    """

    correct: int
    total: int

    @property
    def share(self) -> float:
        """Fraction of right answers, in [0, 1]."""
        return self.correct / max(self.total, 1)


@dataclass(frozen=True)
class Phase3Result:
    """How a run ended.

    Attributes:
        history: Records in order, each with ``step``: of training with ``reward``, of evaluations with
            ``eval_accuracy``.
        before, after: Held-out accuracy of the model at the start and at the end of the run.
    """

    history: Sequence[Mapping[str, Any]]
    before: Accuracy
    after: Accuracy
