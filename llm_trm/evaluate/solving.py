"""Solves one puzzle step by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_trm.errors import InputError
from llm_trm.evaluate.fitting import misfit
from llm_trm.evaluate.questions import Question
from llm_trm.models.puzzle.loading import load_puzzle
from llm_trm.models.puzzle.paper import PuzzleTRM


@dataclass(frozen=True)
class Step:
    """A model's output after a supervision step.

    Attributes:
        number: Number of the step, from 1.
        tokens: The answer [L], on the CPU.
        halt_logit: The halting logit.
    """

    number: int
    tokens: Tensor
    halt_logit: float

    @property
    def confidence(self) -> float:
        """The model's estimate of the probability that the answer is correct."""
        return 1 / (1 + math.exp(-max(self.halt_logit, -700.0)))


@dataclass(frozen=True)
class Attempt:
    """An attempt with all its steps.

    Attributes:
        number: Number of the attempt, from 1.
        steps: The steps, at least one.
    """

    number: int
    steps: tuple[Step, ...]

    @property
    def last(self) -> Step:
        """The last step, which has the answer."""
        return self.steps[-1]


def load_solver(folder: Path | None, question: Question) -> tuple[PuzzleTRM, dict[str, Any], Path]:
    """Load a model, its facts, and its folder.

    Args:
        folder: As for :func:`load_puzzle`; None for the default run of the question's task.

    Raises:
        InputError: There is no model.
    """
    if folder is None:
        folder = Path("runs") / question.task
        if not folder.exists():
            raise InputError(
                f"there is no model in {folder}: train one with `llm-trm train puzzle --task "
                f"{question.task}` first, or name one with --checkpoint"
            )
    return *load_puzzle(folder), folder


def require_solvable(model: PuzzleTRM, facts: dict[str, Any], folder: Path, question: Question) -> None:
    """Check that a model is built for puzzles like this one.

    Raises:
        InputError: It is not.
    """
    remedy = "name another with --checkpoint"
    if facts.get("task") == "arc":
        raise InputError(f"{folder} solves ARC tasks, which only work with `llm-trm eval puzzle`: {remedy}")
    rows, columns = question.rows, question.columns
    if other := misfit(model, facts, question.task, rows, columns):
        raise InputError(
            f"the puzzle is a {question.task} of {rows}x{columns}, but the model in {folder} solves {other}: "
            f"{remedy}, or train one on such puzzles"
        )
    if int(question.tokens.max()) >= model.config.vocab_size:
        raise InputError(f"the puzzle has tokens that the model in {folder} does not know: {remedy}")


def solve(
    model: PuzzleTRM,
    question: Question,
    *,
    max_steps: int,
    tries: int = 1,
    noise: float = 0.0,
    seed: int = 0,
    watch: Callable[[int, Step], object] = lambda _try, _step: None,
) -> Attempt:
    """Attempt a puzzle several times, and return the attempt with the highest halting logit.

    The first attempt has no noise.

    Args:
        model: The model in eval mode.
        question: A question that passes :func:`require_solvable`.
        max_steps: Maximum number of supervision steps per attempt, which ends early if its halting logit is
            positive.
        tries: Number of attempts.
        noise: Noise of the attempts after the first, as for :meth:`PuzzleTRM.predict`.
        seed: Seed of the noise.
        watch: Called with the number of the attempt, from 1, and each step.
    """
    torch.manual_seed(seed)
    best: Attempt | None = None
    for number in range(1, tries + 1):
        steps = []
        for step in _steps(model, question, max_steps, noise if number > 1 else 0.0):
            steps.append(step)
            watch(number, step)
        attempt = Attempt(number, tuple(steps))
        if best is None or attempt.last.halt_logit > best.last.halt_logit:
            best = attempt
    assert best is not None
    return best


def _steps(model: PuzzleTRM, question: Question, max_steps: int, noise: float) -> Iterator[Step]:
    tokens = question.tokens[None].to(model.y_init.device)
    for number, (answer, logit) in enumerate(islice(model.trace(tokens, noise=noise), max_steps), 1):
        step = Step(number, answer[0].cpu(), float(logit[0]))
        yield step
        if step.halt_logit > 0:
            return
