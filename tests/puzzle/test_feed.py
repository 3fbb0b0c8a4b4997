"""Tests of the order of training puzzles."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_trm.data.puzzles.dataset import PuzzleSplit
from llm_trm.train.puzzle.feed import Feed

SAMPLES = 24


def feed(puzzles: Tensor, batch_size: int, seed: int = 0) -> Feed:
    """Grids of one cell, which identifies the sample."""
    cells = torch.arange(len(puzzles), dtype=torch.uint8)[:, None]
    return Feed(PuzzleSplit(cells, cells, puzzles.int()), batch_size, seed, None)


def samples(of: Feed, batches: range) -> list[int]:
    return [int(cell) for number in batches for cell in of.batch(number)[0][:, 0]]


def test_an_epoch_has_every_sample_once_and_the_next_has_another_order() -> None:
    one = feed(torch.zeros(SAMPLES), 8)
    first, second = samples(one, range(3)), samples(one, range(3, 6))
    assert sorted(first) == sorted(second) == list(range(SAMPLES))
    assert first != second
    assert samples(one, range(3)) == first
    assert samples(feed(torch.zeros(SAMPLES), 8, seed=1), range(3)) != first


def test_a_small_split_is_repeated_in_a_batch() -> None:
    found = samples(feed(torch.zeros(5), 12), range(1))
    assert len(found) == 12 and set(found) == set(range(5))


def test_samples_of_an_identifier_follow_each_other_in_any_order() -> None:
    puzzles = torch.arange(SAMPLES) % 6
    one = feed(puzzles, 8)
    orders = []
    for epoch in range(2):
        inputs, _, ids = (
            torch.cat(parts) for parts in zip(*(one.batch(3 * epoch + n) for n in range(3)), strict=True)
        )
        assert torch.equal(ids, puzzles[inputs[:, 0].long()].int())
        runs = ids.unique_consecutive().tolist()
        assert sorted(runs) == list(range(6))
        orders.append((runs, inputs[:, 0].tolist()))
    (first_runs, first), (second_runs, second) = orders
    assert first_runs != second_runs
    # Within an identifier too.
    assert any(
        [s for s in first if s % 6 == number] != [s for s in second if s % 6 == number] for number in range(6)
    )
