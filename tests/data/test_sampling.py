"""Tests that noise is a function of seed, problem and position, and gives the right frequencies."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from llm_trm.data.generation_config import Sampling
from llm_trm.data.sampling import draw, gumbel_noise
from llm_trm.errors import InputError

_MASK = 2**64 - 1
_NONE = torch.tensor([False])


def _splitmix64(state: int) -> int:
    """Steele, Lea and Flood's generator with Python integers: the output after ``state``."""
    z = (state + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def _column(*values: int) -> Tensor:
    return torch.tensor(values)


def _draw_many(logits: list[float], sampling: Sampling, count: int) -> Tensor:
    """The frequency of each token as a fraction."""
    drawn = draw(
        sampling,
        torch.tensor(logits).expand(count, -1),
        torch.full((count,), 3),
        torch.arange(count),
        torch.zeros(count, dtype=torch.bool),
    )
    return drawn.bincount(minlength=len(logits)) / count


@pytest.mark.parametrize("seed", [0, 7, -1, 2**63 + 5])
def test_noise_is_splitmix64(seed: int) -> None:
    noise = gumbel_noise(seed, _column(11), _column(4), 6)[0]
    key = _splitmix64((_splitmix64((_splitmix64(seed & _MASK) + 11) & _MASK) + 4) & _MASK)
    for token, value in enumerate(noise.tolist()):
        bits = _splitmix64((key + (token + 1) * 0x9E3779B97F4A7C15) & _MASK) >> 32
        assert value == pytest.approx(-math.log(-math.log1p(-(bits + 0.5) / 2**32)), rel=1e-4, abs=1e-5)


def test_noise_of_a_row_does_not_depend_on_its_batch() -> None:
    together = gumbel_noise(5, _column(1, 9, 2), _column(0, 3, 7), 100)
    assert torch.equal(together[1], gumbel_noise(5, _column(9), _column(3), 100)[0])
    assert torch.equal(together[2, :50], gumbel_noise(5, _column(2), _column(7), 50)[0])


def test_seed_problem_and_position_each_change_the_noise() -> None:
    reference = gumbel_noise(5, _column(1), _column(2), 100)
    for other in (
        gumbel_noise(6, _column(1), _column(2), 100),
        gumbel_noise(5, _column(2), _column(2), 100),
        gumbel_noise(5, _column(1), _column(3), 100),
        gumbel_noise(5, _column(2), _column(1), 100),
    ):
        assert not (other == reference).any()


def test_noise_is_gumbel_and_independent_between_rows_and_tokens() -> None:
    noise = gumbel_noise(0, _column(*range(200)), _column(*([0, 1] * 100)), 2000).double()
    count = noise.numel()
    deviation = math.pi / math.sqrt(6)
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772157, abs=5 * deviation / count**0.5)
    assert noise.std().item() == pytest.approx(deviation, rel=0.01)
    centred = (noise - noise.mean()) / noise.std()
    for a, b in ((centred[1:], centred[:-1]), (centred[:, 1:], centred[:, :-1])):
        assert (a * b).mean().abs() < 5 / count**0.5


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_those_of_softmax(temperature: float) -> None:
    logits, count = [0.0, 1.0, -2.0, 1.5], 100_000
    expected = (torch.tensor(logits) / temperature).softmax(0)
    shares = _draw_many(logits, Sampling(temperature, seed=1), count)
    assert ((shares - expected).abs() < 5 * (expected * (1 - expected) / count).sqrt()).all()


def test_top_p_samples_from_the_smallest_sufficient_set() -> None:
    # Probabilities 0.1, 0.4, 0.2, 0.3: the two most likely have 0.7, the three most likely 0.9.
    logits, count = torch.tensor([0.1, 0.4, 0.2, 0.3]).log().tolist(), 20_000
    shares = _draw_many(logits, Sampling(1.0, top_p=0.75, seed=1), count)
    expected = torch.tensor([0.0, 0.4, 0.2, 0.3]) / 0.9
    assert shares[0] == 0
    assert ((shares - expected).abs() < 0.02).all()
    assert _draw_many(logits, Sampling(1.0, top_p=0.01), 100)[1] == 1


def test_temperature_0_and_greedy_rows_take_the_most_likely_token() -> None:
    logits = torch.randn(64, 10)
    indices = torch.arange(64)
    greedy = indices % 2 == 0
    likeliest = logits.argmax(-1)
    assert torch.equal(draw(Sampling(0.0), logits, indices, indices, ~greedy & greedy), likeliest)
    drawn = draw(Sampling(5.0), logits, indices, indices, greedy)
    assert torch.equal(drawn[greedy], likeliest[greedy])
    assert not torch.equal(drawn, likeliest)


@pytest.mark.parametrize("arguments", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}])
def test_values_out_of_range_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(arguments))):
        Sampling(**arguments)
