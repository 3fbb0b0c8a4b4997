"""Tests of phase 2 baselines: ridge regression against least squares, streaming against one pass."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from llm_trm.errors import InputError
from llm_trm.evaluate.baselines import (
    LAST_STATE,
    RIDGE,
    STRENGTHS,
    TRAINING_MEAN,
    Moments,
    Ridge,
    TrainingMean,
    choose_strength,
    fit_baselines,
    summarise,
)

WIDTH = 3


def draw(count: int, seed: int = 0, noise: float = 0.1) -> tuple[Tensor, Tensor, Tensor]:
    """Last states, means, and targets that depend linearly on both and are far from zero."""
    generator = torch.Generator().manual_seed(seed)
    last, mean, error = (torch.randn(count, WIDTH, generator=generator) for _ in range(3))
    generator.manual_seed(99)
    weight = torch.randn(2 * WIDTH, WIDTH, generator=generator)
    return last, mean, torch.cat((last, mean), 1) @ weight + 5.0 + noise * error


def moments(*parts: Sequence[Tensor]) -> Moments:
    found = Moments(WIDTH)
    for last, mean, targets in parts:
        found.add(last, mean, targets)
    return found


def test_summaries_of_ragged_contexts() -> None:
    rows = torch.tensor([[1.0, 0.0], [3.0, 2.0], [7.0, 7.0], [0.0, 0.0], [2.0, 4.0], [4.0, 2.0]])
    last, mean = summarise(rows, torch.tensor([0, 2, 3, 6]))
    assert last.tolist() == [[3.0, 2.0], [7.0, 7.0], [4.0, 2.0]]
    assert mean.tolist() == [[2.0, 1.0], [7.0, 7.0], [2.0, 2.0]]


@pytest.mark.parametrize("strength", [1e-6, 1e-2, 10.0])
def test_ridge_is_least_squares_with_penalty_rows(strength: float) -> None:
    last, mean, targets = draw(40)
    features = torch.cat((last, mean), 1).double()
    spread = (features - features.mean(0)).square().sum(0).mean()
    penalty = torch.cat(
        ((strength * spread).sqrt() * torch.eye(2 * WIDTH, dtype=torch.float64), torch.zeros(2 * WIDTH, 1)), 1
    )
    left = torch.cat((torch.cat((features, torch.ones(40, 1)), 1), penalty))
    right = torch.cat((targets.double(), torch.zeros(2 * WIDTH, WIDTH)))
    expected = torch.linalg.lstsq(left, right).solution
    torch.testing.assert_close(moments((last, mean, targets)).solve(strength).weight, expected)


def test_moments_give_the_error_of_a_ridge() -> None:
    pairs = draw(30)
    ridge = Ridge(torch.randn(2 * WIDTH + 1, WIDTH, dtype=torch.float64), 0.0)
    expected = (ridge(pairs[0].double(), pairs[1].double()) - pairs[2]).square().sum()
    assert moments(pairs).error(ridge) == pytest.approx(float(expected), rel=1e-9)


def test_stream_equals_one_shot() -> None:
    pairs = draw(60)
    whole = fit_baselines([pairs])
    pieces = fit_baselines(tuple(t[begin:end] for t in pairs) for begin, end in ((0, 7), (7, 8), (8, 60)))  # type: ignore[misc]
    for name, baseline in whole.items():
        torch.testing.assert_close(pieces[name](*pairs[:2]), baseline(*pairs[:2]))


def test_baseline_predictions() -> None:
    last, mean, targets = draw(50, noise=0.0)
    fitted = fit_baselines([(last, mean, targets)])
    assert fitted[LAST_STATE](last, mean) is last
    assert isinstance(fitted[TRAINING_MEAN], TrainingMean)
    torch.testing.assert_close(fitted[TRAINING_MEAN](last, mean), targets.mean(0).expand(50, -1))
    fresh_last, fresh_mean, fresh_targets = draw(20, seed=7, noise=0.0)
    torch.testing.assert_close(fitted[RIDGE](fresh_last, fresh_mean), fresh_targets, atol=1e-3, rtol=0)


def test_strength_follows_the_held_out_pairs() -> None:
    clean = draw(40, noise=0.0)
    assert choose_strength(moments(clean), moments(draw(40, seed=1, noise=0.0))) == STRENGTHS[0]
    # The targets are independent of the features, so the strongest regularisation has the lowest error.
    noise = [torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    assert choose_strength(moments(noise[:3]), moments(noise[3:])) == STRENGTHS[-1]


def test_every_fifth_pair_chooses_the_strength_and_all_are_fitted() -> None:
    last, mean, targets = draw(50)
    ridge = fit_baselines([(last, mean, targets)])[RIDGE]
    assert isinstance(ridge, Ridge)
    chosen = torch.arange(50) % 5 == 4
    fit, held_out = (moments((last[keep], mean[keep], targets[keep])) for keep in (~chosen, chosen))
    assert ridge.strength == choose_strength(fit, held_out)
    torch.testing.assert_close(ridge.weight, moments((last, mean, targets)).solve(ridge.strength).weight)


@pytest.mark.parametrize("count", [0, 4])
def test_too_few_pairs_are_refused(count: int) -> None:
    with pytest.raises(InputError, match=rf"{count} pairs.*--no-baselines"):
        fit_baselines([draw(count)] if count else [])
