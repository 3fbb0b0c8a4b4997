"""How well a model solves puzzles that it has not seen."""

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
    """How a model did on a number of puzzles.

    Attributes:
        puzzles: How many.
        exact: Share that is solved without a wrong cell.
        cells: Mean share of right cells.
        steps: Mean supervision steps, those of all tries together.
        halted: Share whose halting logit was positive at the exit.
        halt_right: Share whose halting logit said rightly whether the answer is right.
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
    """Several tries, of which the halting head chooses, for each sample, the one that it is surest of.

    The first try is without noise. ``steps`` are those of all tries together.

    Args:
        tokens: [B, L].
        puzzles: Puzzle identifiers [B].
        tries: How many.
        noise: Of the tries behind the first, as for :meth:`PuzzleTRM.predict`.
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
        predict: Answers tokens [B, L] with puzzle identifiers [B].
        split: At least one puzzle, on the model's device.
        batch_size: B.
        progress: Told the number of puzzles that are done.
    """
    dtype = widest(split.inputs.device)
    sums = torch.zeros(5, dtype=dtype, device=split.inputs.device)
    for begin in range(0, len(split), batch_size):
        rows = slice(begin, begin + batch_size)
        found, labels = predict(split.inputs[rows], split.puzzles[rows]), split.labels[rows]
        counts = labels != PADDING
        right = ((found.tokens == labels) & counts).sum(-1)
        exact = right == counts.sum(-1)
        halted = found.halt_logits > 0
        measured = (exact, right / counts.sum(-1).clamp_min(1), found.steps, halted, halted == exact)
        sums += torch.stack([values.to(dtype).sum() for values in measured])
        progress(min(begin + batch_size, len(split)))
    means = (sums / len(split)).tolist()
    return PuzzleScore(len(split), *means)


def with_answers(split: PuzzleSplit) -> PuzzleSplit:
    """The puzzles whose answers are known: a contest's are not, and would all count as solved."""
    known = (split.labels != PADDING).any(-1)
    return split if bool(known.all()) else _take(split, known)


def draw_puzzles(split: PuzzleSplit, count: int, seed: int) -> PuzzleSplit:
    """``count`` puzzles drawn at random, in their order; all if there are no more."""
    drawn = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))[:count]
    return _take(split, drawn.sort().values)


def _take(split: PuzzleSplit, rows: Tensor) -> PuzzleSplit:
    return PuzzleSplit(split.inputs[rows], split.labels[rows], split.puzzles[rows])
