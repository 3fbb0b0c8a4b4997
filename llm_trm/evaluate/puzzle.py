"""Scores a model on held-out puzzles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_trm.data.puzzles.dataset import PADDING, PuzzleSplit
from llm_trm.models.puzzle.losses import widest
from llm_trm.models.puzzle.paper import Prediction, PuzzleTRM


@dataclass(frozen=True)
class PuzzleScore:
    """Score of a model on a set of puzzles.

    Attributes:
        puzzles: Number of puzzles.
        exact: Fraction of puzzles with all cells correct.
        cells: Mean fraction of correct cells.
        steps: Mean number of supervision steps, summed over all attempts.
        halted: Fraction of puzzles whose final halting logit was positive.
        halt_right: Fraction of puzzles whose final halting logit correctly predicted the correctness.
    """

    puzzles: int
    exact: float
    cells: float
    steps: float
    halted: float
    halt_right: float


@torch.no_grad()
def best_of(
    model: PuzzleTRM,
    tokens: Tensor,
    puzzles: Tensor,
    *,
    tries: int = 1,
    noise: float = 0.0,
    max_steps: int | None = None,
    halting: bool = True,
    compact: bool = True,
    threshold: float = 0.5,
) -> Prediction:
    """Make several attempts, and choose each sample's attempt with the highest halting logit.

    The first attempt has no noise. ``steps`` are summed over all attempts.

    Args:
        tokens: [B, L].
        puzzles: Puzzle identifiers [B].
        tries: Number of attempts.
        noise: Noise of the attempts after the first, as for :meth:`PuzzleTRM.predict`.
        max_steps, halting, compact, threshold: As for :meth:`PuzzleTRM.predict`.
    """
    best: Prediction | None = None
    for number in range(tries):
        found = model.predict(
            tokens,
            puzzles,
            max_steps=max_steps,
            halting=halting,
            compact=compact,
            threshold=threshold,
            noise=noise if number else 0.0,
        )
        best = found if best is None else _surer(best, found)
    assert best is not None
    return best


def _surer(best: Prediction, found: Prediction) -> Prediction:
    better = found.halt_logits > best.halt_logits
    return Prediction(
        torch.where(better[:, None], found.tokens, best.tokens),
        torch.where(better, found.halt_logits, best.halt_logits),
        best.steps + found.steps,
    )


def score(
    predict: Callable[[Tensor, Tensor], Prediction],
    split: PuzzleSplit,
    batch_size: int,
    progress: Callable[[int], object] = lambda _: None,
) -> PuzzleScore:
    """Score answers to all puzzles of a split.

    Args:
        predict: Function that answers tokens [B, L] with puzzle identifiers [B].
        split: At least one puzzle, on the model's device.
        batch_size: Batch size B.
        progress: Called with the number of finished puzzles.
    """
    dtype = widest(split.inputs.device)
    sums = torch.zeros(5, dtype=dtype, device=split.inputs.device)
    for start in range(0, len(split), batch_size):
        rows = slice(start, start + batch_size)
        found, labels = predict(split.inputs[rows], split.puzzles[rows]), split.labels[rows]
        counts = labels != PADDING
        right = ((found.tokens == labels) & counts).sum(-1)
        exact = right == counts.sum(-1)
        halted = found.halt_logits > 0
        measured = (exact, right / counts.sum(-1).clamp_min(1), found.steps, halted, halted == exact)
        sums += torch.stack([values.to(dtype).sum() for values in measured])
        progress(min(start + batch_size, len(split)))
    means = (sums / len(split)).tolist()
    return PuzzleScore(len(split), *means)


def with_answers(split: PuzzleSplit) -> PuzzleSplit:
    """The puzzles with known answers. Others, such as a contest's, would all count as solved."""
    known = (split.labels != PADDING).any(-1)
    return split if bool(known.all()) else _take(split, known)


def draw_puzzles(split: PuzzleSplit, count: int, seed: int) -> PuzzleSplit:
    """Sample up to ``count`` puzzles at random, keeping their order."""
    drawn = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))[:count]
    return _take(split, drawn.sort().values)


def _take(split: PuzzleSplit, rows: Tensor) -> PuzzleSplit:
    return PuzzleSplit(split.inputs[rows], split.labels[rows], split.puzzles[rows])
