"""Baselines for a recursion: predictions of the state after thinking that involve no reasoning.

A linear map needs inputs of a fixed size, so each baseline represents a context by two vectors: its last
state, from which the language model itself would continue, and the mean of all its states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_trm.errors import InputError

#: ``baseline(last, mean)``: a prediction [B, D'] from the last and the mean state of each context [B, D'].
Baseline = Callable[[Tensor, Tensor], Tensor]

LAST_STATE, TRAINING_MEAN, RIDGE = "last context state", "training mean", "ridge regression"

#: Candidate regularisation strengths, relative to the mean square of the centred features.
STRENGTHS = tuple(10.0**exponent for exponent in range(-6, 3))
#: One training pair in this many is held out to choose the strength.
_VALIDATION = 5


def summarise(rows: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Last and mean state of each context.

    Args:
        rows: States of all contexts, concatenated [R, D'].
        offsets: Start of each context and end of the last, int64 [N + 1]; no context is empty.

    Returns:
        Both [N, D'], in the dtype of ``rows``.
    """
    lengths = offsets.diff()
    sample = torch.repeat_interleave(torch.arange(len(lengths), device=rows.device), lengths)
    sums = rows.new_zeros(len(lengths), rows.shape[-1], dtype=torch.float64).index_add_(
        0, sample, rows.double()
    )
    return rows[offsets[1:] - 1], (sums / lengths[:, None]).to(rows.dtype)


def last_state(last: Tensor, _mean: Tensor) -> Tensor:
    """Predict the last context state, as if thinking changed nothing."""
    return last


@dataclass(frozen=True)
class TrainingMean:
    """Predicts the mean target of the training pairs [D'] for every context."""

    value: Tensor

    def __call__(self, last: Tensor, _mean: Tensor) -> Tensor:
        return self.value.to(last).expand_as(last)


@dataclass(frozen=True)
class Ridge:
    """A linear map with intercept from ``[last, mean, 1]``.

    Attributes:
        weight: float64 [2 D' + 1, D'].
        strength: Regularisation strength, one of :data:`STRENGTHS`.
    """

    weight: Tensor
    strength: float

    def __call__(self, last: Tensor, mean: Tensor) -> Tensor:
        return (_features(last, mean) @ self.weight.to(last.device)).to(last.dtype)


class Moments:
    """Sums over pairs in float64, from which a ridge regression is solved without storing the pairs."""

    def __init__(self, width: int) -> None:
        self.gram = torch.zeros(2 * width + 1, 2 * width + 1, dtype=torch.float64)
        self.cross = torch.zeros(2 * width + 1, width, dtype=torch.float64)
        self.square = torch.zeros((), dtype=torch.float64)

    @property
    def count(self) -> int:
        """Number of pairs added."""
        return int(self.gram[-1, -1])

    @property
    def mean_target(self) -> Tensor:
        """Mean of the targets, float64 [D']."""
        return self.cross[-1] / self.count

    def add(self, last: Tensor, mean: Tensor, targets: Tensor) -> None:
        """Add pairs: last and mean states and targets, each [B, D']."""
        features, targets = _features(last, mean).cpu(), targets.double().cpu()
        self.gram += features.T @ features
        self.cross += features.T @ targets
        self.square += targets.square().sum()

    def __add__(self, other: Moments) -> Moments:
        total = Moments(self.cross.shape[1])
        total.gram = self.gram + other.gram
        total.cross = self.cross + other.cross
        total.square = self.square + other.square
        return total

    def solve(self, strength: float) -> Ridge:
        """The weights W that minimise ``|X W - Y|^2 + penalty |W|^2``; the intercept is not penalised.

        The penalty is ``strength`` times the mean of the features' centred sums of squares, which makes it
        independent of the scale of the states and the number of pairs.
        """
        sums = self.gram[-1, :-1]
        spread = (self.gram.diagonal()[:-1] - sums.square() / self.count).mean()
        scale = float(spread) if spread > 0 else 1.0
        penalty = torch.full((len(self.gram),), strength * scale, dtype=torch.float64)
        penalty[-1] = 0.0
        return Ridge(torch.linalg.solve(self.gram + penalty.diag(), self.cross), strength)

    def error(self, ridge: Ridge) -> float:
        """Sum of squared errors of ``ridge`` on the added pairs."""
        weight = ridge.weight
        explained = (weight * (self.gram @ weight)).sum() - 2.0 * (weight * self.cross).sum()
        return float(explained + self.square)


def fit_baselines(pairs: Iterable[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Baseline]:
    """Fit all baselines in one pass over the training pairs, and return them by name.

    Args:
        pairs: Batches of last states, mean states and targets, each [B, D'].

    Raises:
        InputError: There are fewer than five pairs. Every fifth pair is used to choose the ridge strength.
    """
    fit: Moments | None = None
    held_out: Moments | None = None
    seen = 0
    for last, mean, targets in pairs:
        if fit is None or held_out is None:
            fit, held_out = Moments(targets.shape[1]), Moments(targets.shape[1])
        chosen = (
            torch.arange(seen, seen + len(targets), device=targets.device) % _VALIDATION == _VALIDATION - 1
        )
        fit.add(last[~chosen], mean[~chosen], targets[~chosen])
        held_out.add(last[chosen], mean[chosen], targets[chosen])
        seen += len(targets)
    require_enough(seen)
    assert fit is not None and held_out is not None
    ridge = (fit + held_out).solve(choose_strength(fit, held_out))
    mean_target = (fit + held_out).mean_target
    return {LAST_STATE: last_state, TRAINING_MEAN: TrainingMean(mean_target), RIDGE: ridge}


def require_enough(count: int) -> None:
    """Raise InputError if ``count`` training pairs are too few for :func:`fit_baselines`."""
    if count < _VALIDATION:
        raise InputError(
            f"the training data has {count} pairs, but the baselines need at least {_VALIDATION}: provide "
            "more with --train-data, or skip the baselines with --no-baselines"
        )


def choose_strength(fit: Moments, held_out: Moments, strengths: Sequence[float] = STRENGTHS) -> float:
    """The strength whose solution on ``fit`` has the lowest error on ``held_out``."""
    return min(strengths, key=lambda strength: held_out.error(fit.solve(strength)))


def _features(last: Tensor, mean: Tensor) -> Tensor:
    one = torch.ones(len(last), 1, dtype=torch.float64, device=last.device)
    return torch.cat((last.double(), mean.double(), one), dim=1)
