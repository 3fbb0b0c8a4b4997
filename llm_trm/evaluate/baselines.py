"""What a recursion must beat: predictions of the state after thinking that need no thought.

All of them see a context through two vectors of fixed size, its last state and the mean of its states, since
a linear map needs as many inputs for a short context as for a long one: the last state is what the language
model itself would go on from, and the mean is the plainest word on all the others.
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

#: Regularisation strengths that are tried, as shares of the mean square of the centred features.
STRENGTHS = tuple(10.0**exponent for exponent in range(-6, 3))
#: One training pair of so many chooses the strength.
_VALIDATION = 5


def summarise(rows: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Last and mean state of each context.

    Args:
        rows: States of all contexts, one behind the other [R, D'].
        offsets: Where each begins, and the end of the last, int64 [N + 1]; none is empty.

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
    """The last context state as it is: thinking would change nothing."""
    return last


@dataclass(frozen=True)
class TrainingMean:
    """The mean target of the training pairs [D'], whatever the context."""

    value: Tensor

    def __call__(self, last: Tensor, _mean: Tensor) -> Tensor:
        return self.value.to(last).expand_as(last)


@dataclass(frozen=True)
class Ridge:
    """A linear map with intercept from ``[last, mean, 1]``.

    Attributes:
        weight: float64 [2 D' + 1, D'].
        strength: Its regularisation, of :data:`STRENGTHS`.
    """

    weight: Tensor
    strength: float

    def __call__(self, last: Tensor, mean: Tensor) -> Tensor:
        return (_features(last, mean) @ self.weight.to(last.device)).to(last.dtype)


class Moments:
    """Sums over pairs that a ridge regression is solved from, in float64; pairs are added and forgotten."""

    def __init__(self, width: int) -> None:
        self.gram = torch.zeros(2 * width + 1, 2 * width + 1, dtype=torch.float64)
        self.cross = torch.zeros(2 * width + 1, width, dtype=torch.float64)
        self.square = torch.zeros((), dtype=torch.float64)

    @property
    def count(self) -> int:
        """How many pairs were added."""
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
        """The weights W that minimise ``|X W - Y|^2 + penalty |W|^2``; the intercept carries no penalty.

        The penalty is ``strength`` times the mean over the features of their centred sums of squares, so that
        a strength means the same for any scale of the states and number of pairs.
        """
        sums = self.gram[-1, :-1]
        spread = (self.gram.diagonal()[:-1] - sums.square() / self.count).mean()
        scale = float(spread) if spread > 0 else 1.0
        penalty = torch.full((len(self.gram),), strength * scale, dtype=torch.float64)
        penalty[-1] = 0.0
        return Ridge(torch.linalg.solve(self.gram + penalty.diag(), self.cross), strength)

    def error(self, ridge: Ridge) -> float:
        """Sum of squared errors of ``ridge`` on these pairs."""
        weight = ridge.weight
        explained = (weight * (self.gram @ weight)).sum() - 2.0 * (weight * self.cross).sum()
        return float(explained + self.square)


def fit_baselines(pairs: Iterable[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Baseline]:
    """All baselines, by name, in one pass over training pairs.

    Args:
        pairs: Batches of last states, mean states and targets, each [B, D'].

    Raises:
        InputError: Fewer than five pairs: the strength of the ridge regression is chosen on every fifth.
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
            f"the training data holds {count} pairs, and the baselines need at least {_VALIDATION}: name "
            "more with --train-data, or leave them out with --no-baselines"
        )


def choose_strength(fit: Moments, held_out: Moments, strengths: Sequence[float] = STRENGTHS) -> float:
    """The strength whose solution on ``fit`` has the least error on ``held_out``."""
    return min(strengths, key=lambda strength: held_out.error(fit.solve(strength)))


def _features(last: Tensor, mean: Tensor) -> Tensor:
    one = torch.ones(len(last), 1, dtype=torch.float64, device=last.device)
    return torch.cat((last.double(), mean.double(), one), dim=1)
