"""Evaluates a model on test puzzles in several inference modes, with accuracy and time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_trm.data.puzzles.arc_vote import ArcBallot, ArcScore
from llm_trm.data.puzzles.dataset import PuzzleInfo, PuzzleSplit
from llm_trm.errors import InputError
from llm_trm.evaluate.arc import cast
from llm_trm.evaluate.fitting import misfit
from llm_trm.evaluate.puzzle import PuzzleScore, best_of, score
from llm_trm.evaluate.statistics import wilson
from llm_trm.models.puzzle.paper import Prediction, PuzzleTRM


@dataclass(frozen=True)
class Mode:
    """An inference mode.

    Attributes:
        halting: Whether a puzzle halts once its halting probability exceeds ``threshold``.
        max_steps: Maximum number of supervision steps per attempt.
        tries: Number of attempts per puzzle.
        noise: Noise of the attempts after the first, as for :meth:`PuzzleTRM.predict`.
        threshold: See ``halting``.
    """

    halting: bool
    max_steps: int
    tries: int = 1
    noise: float = 0.0
    threshold: float = 0.5

    @property
    def name(self) -> str:
        """A short name for tables."""
        steps = "with halting" if self.halting else "without halting"
        if self.halting and self.threshold != 0.5:
            steps += f" at {self.threshold:g}"
        return steps if self.tries == 1 else f"{steps}, {self.tries} tries"


@dataclass(frozen=True)
class ModeResult:
    """Result of a model in one mode.

    Attributes:
        mode: The mode.
        score: The score.
        interval: 95% Wilson interval of ``score.exact``.
        seconds: Wall time of the prediction per puzzle.
        arc: Score of two attempts, voted over all augmentations of an ARC task; None for other puzzles.
    """

    mode: Mode
    score: PuzzleScore
    interval: tuple[float, float]
    seconds: float
    arc: ArcScore | None = None

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON values."""
        return {
            "name": self.mode.name,
            **asdict(self.mode),
            **asdict(self.score),
            "exact_interval": list(self.interval),
            "seconds_per_puzzle": self.seconds,
            "arc": None if self.arc is None else asdict(self.arc),
        }


def evaluate_mode(
    model: PuzzleTRM,
    split: PuzzleSplit,
    mode: Mode,
    batch_size: int,
    *,
    seed: int = 0,
    ballot: ArcBallot | None = None,
    progress: Callable[[int], object] = lambda _: None,
) -> ModeResult:
    """Evaluate a model on all puzzles of a split.

    Args:
        model: The model in eval mode.
        split: At least one puzzle, each with an answer, on the model's device.
        mode: The inference mode.
        batch_size: Puzzles per batch.
        seed: Seed of the noise.
        ballot: Collects the votes of ARC puzzles; must be new.
        progress: Called after every batch with the number of its puzzles.
    """
    # Warm up, so that one-off work such as choosing kernels is not timed.
    first = slice(min(batch_size, len(split)))
    best_of(
        model,
        split.inputs[first],
        split.puzzles[first],
        max_steps=min(2, mode.max_steps),
        halting=mode.halting,
        threshold=mode.threshold,
    ).halt_logits.cpu()
    torch.manual_seed(seed)
    seconds = 0.0

    def predict(tokens: Tensor, puzzles: Tensor) -> Prediction:
        nonlocal seconds
        since = time.perf_counter()
        found = best_of(
            model,
            tokens,
            puzzles,
            tries=mode.tries,
            noise=mode.noise,
            max_steps=mode.max_steps,
            halting=mode.halting,
            threshold=mode.threshold,
        )
        found.halt_logits.cpu()  # waits for the device
        seconds += time.perf_counter() - since
        if ballot is not None:
            cast(ballot, tokens, puzzles, found)
        progress(len(tokens))
        return found

    found = score(predict, split, batch_size)
    return ModeResult(
        mode,
        found,
        wilson(round(found.exact * found.puzzles), found.puzzles),
        seconds / found.puzzles,
        None if ballot is None else ballot.score(),
    )


def require_fitting(model: PuzzleTRM, facts: dict[str, Any], info: PuzzleInfo, where: Path) -> None:
    """Check that a model is built for the puzzles of a folder.

    Args:
        facts: Facts of its checkpoint.
        info: Description of the folder's puzzles.
        where: The folder.

    Raises:
        InputError: The model is not built for these puzzles.
    """
    config, remedy = model.config, "name another --data folder or another --checkpoint"
    if other := misfit(model, facts, info.task, info.rows, info.columns):
        raise InputError(
            f"{where} has {info.task} puzzles of {info.rows}x{info.columns}, but the model solves {other}: "
            f"{remedy}"
        )
    if config.vocab_size != info.vocab_size:
        raise InputError(
            f"{where} has a vocabulary of {info.vocab_size} tokens, but the model has {config.vocab_size}: "
            f"{remedy}"
        )
    if config.puzzle_dim and config.num_puzzles < info.num_puzzles:
        raise InputError(
            f"{where} has {info.num_puzzles} puzzle identifiers, but the model has embeddings for "
            f"{config.num_puzzles}: name the folder that it was trained on with --data"
        )
