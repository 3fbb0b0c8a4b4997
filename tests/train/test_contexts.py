"""Compressed contexts: what is read, how batches are padded, in which order they come."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llm_trm.data.pairs import open_pairs
from llm_trm.models import contexts as contexts_module
from llm_trm.models.compression import load_compressor
from llm_trm.models.contexts import Contexts, read_contexts
from llm_trm.train.phase2.order import EpochOrder, graph_lengths, split
from tests.train.toy import COMPRESSED, write_toy


@pytest.fixture
def contexts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Contexts:
    monkeypatch.setattr(contexts_module, "_CHUNK", 7)  # cuts through samples
    write_toy(tmp_path)
    pairs = open_pairs(tmp_path / "pairs")
    return read_contexts(pairs, load_compressor(tmp_path / "compressor"), torch.device("cpu"))


def test_contexts_are_the_compressed_states(contexts: Contexts, tmp_path: Path) -> None:
    compressor = load_compressor(tmp_path / "compressor")
    number = 0
    for shard in open_pairs(tmp_path / "pairs").shards():
        for start, end, target in zip(shard.offsets, shard.offsets[1:], shard.hidden_post, strict=False):
            batch = contexts.batch([number])
            torch.testing.assert_close(batch.context[0], compressor(shard.hidden_pre[start:end]))
            torch.testing.assert_close(batch.target[0], compressor(target))
            number += 1
    assert number == len(contexts) == 40
    assert contexts.width == COMPRESSED


def test_batch_is_padded_behind_its_contexts_with_zeros(contexts: Contexts) -> None:
    samples = [3, 39, 0]
    batch = contexts.batch(samples)
    lengths = [contexts.lengths[sample] for sample in samples]
    assert batch.context.shape == (3, max(lengths), COMPRESSED)
    for row, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
        first = contexts.offsets[sample]
        assert torch.equal(batch.context[row, :length], contexts.rows[first : first + length])
        assert not batch.context[row, length:].any()
        assert batch.mask[row].tolist() == [1.0] * length + [0.0] * (max(lengths) - length)
    assert contexts.batch(samples, lambda length: length + 5).mask.shape == (3, max(lengths) + 5)


def test_digest_changes_with_data_and_with_lengths(contexts: Contexts) -> None:
    same = Contexts(contexts.rows, contexts.offsets.clone(), contexts.targets.clone())
    assert same.digest() == contexts.digest()
    other = contexts.targets.clone()
    other[5, 3] += 1e-6
    assert Contexts(contexts.rows, contexts.offsets, other).digest() != contexts.digest()
    shifted = contexts.offsets.clone()
    shifted[4] += 1
    assert Contexts(contexts.rows, shifted, contexts.targets).digest() != contexts.digest()


def test_split_is_seeded_and_disjoint() -> None:
    training, held_out = split(100, 0.05, seed=3)
    assert len(held_out) == 5
    assert sorted(training + held_out) == list(range(100))
    assert split(100, 0.05, seed=3) == (training, held_out)
    assert split(100, 0.05, seed=4) != (training, held_out)
    assert len(split(4, 0.05, seed=0)[1]) == 1


def order(samples: int = 1000, batch_size: int = 8) -> EpochOrder:
    chance = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 61, (2 * samples,), generator=chance).tolist()
    return EpochOrder(range(0, 2 * samples, 2), lengths, batch_size, seed=5)


def test_epoch_visits_each_sample_once_but_for_a_rest_that_changes() -> None:
    found = order(1003)
    rests = []
    for epoch in range(3):
        batches = found.batches(epoch)
        assert len(batches) == len(found) == 125
        assert {len(batch) for batch in batches} == {8}
        seen = {sample for batch in batches for sample in batch}
        assert len(seen) == 1000 and seen <= set(found.samples)
        rests.append(set(found.samples) - seen)
    assert rests[0] != rests[1]


def test_epoch_is_a_function_of_seed_and_number() -> None:
    assert order().batches(4) == order().batches(4)
    assert order().batches(4) != order().batches(5)


def test_batches_hold_contexts_of_similar_length_in_no_order_of_length() -> None:
    found = order()
    lengths = [[found.lengths[sample] for sample in batch] for batch in found.batches(0)]
    spread = [max(batch) - min(batch) for batch in lengths]
    assert sum(spread) / len(spread) < 5  # of 40; eight samples at random spread over 32
    means = torch.tensor([sum(batch) / len(batch) for batch in lengths])
    assert abs(float(torch.corrcoef(torch.stack((means, torch.arange(len(means)))))[0, 1])) < 0.3


def test_few_lengths_on_a_gpu() -> None:
    for longest in (5, 64, 300, 1025):
        bucket = graph_lengths(longest)
        padded = {bucket(length) for length in range(1, longest + 1)}
        assert len(padded) <= 8
        assert all(bucket(length) >= length for length in range(1, longest + 1))
        assert max(padded) <= longest + 64
