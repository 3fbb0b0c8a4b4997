"""Tests of phase 2 metrics against values computed by hand, and of the evaluation on tiny pairs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llm_trm.data.pairs import PairFiles
from llm_trm.errors import InputError
from llm_trm.evaluate.baselines import LAST_STATE, RIDGE, TRAINING_MEAN
from llm_trm.evaluate.phase2 import (
    TRM,
    TRUE_STATE,
    Phase2Evaluation,
    Scores,
    evaluate_phase2,
    measure,
    rank,
    score,
)
from llm_trm.evaluate.statistics import group_labels, value_of, wilson
from llm_trm.models.compression import DimensionCompressor
from llm_trm.models.sequence_trm import SequenceTRM
from tests.evaluate.sample import D_COMPRESSED, VOCABULARY, D, write_pairs


def axis_compressor() -> DimensionCompressor:
    """Keeps the first two of three dimensions."""
    compressor = DimensionCompressor(3, 2)
    with torch.no_grad():
        compressor.compress.weight.copy_(torch.eye(3)[:2])
    return compressor


def test_metrics_of_a_pair_computed_by_hand() -> None:
    figures = measure(
        torch.tensor([[3.0, 4.0], [0.0, 2.0]]),
        torch.tensor([[4.0, 3.0], [0.0, 1.0]]),
        torch.tensor([[4.0, 3.0, 12.0], [0.0, 1.0, 0.0]]),
        axis_compressor(),
        head=lambda states: states,
        next_tokens=torch.tensor([0, 1]),
    )
    assert figures["cosine"].tolist() == pytest.approx([24 / 25, 1.0])
    assert figures["mse"].tolist() == pytest.approx([1.0, 0.5])
    assert figures["relative_error"].tolist() == pytest.approx([math.sqrt(2) / 5, 1.0])
    assert figures["full_cosine"].tolist() == pytest.approx([24 / (5 * 13), 1.0])
    assert figures["rank"].tolist() == [2, 1]  # logits 3, 4, 0 and 0, 2, 0


def test_rank_counts_strictly_higher_logits() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0]]).expand(4, -1)
    assert rank(logits, torch.arange(4)).tolist() == [4, 1, 1, 3]


def test_broken_logits_rank_last() -> None:
    nan = float("nan")
    logits = torch.tensor([[nan, nan, nan], [1.0, nan, 0.0], [1.0, nan, 0.0]])
    assert rank(logits, torch.tensor([0, 0, 1])).tolist() == [3, 2, 3]


def test_scores_are_means_and_fractions() -> None:
    figures = {
        "cosine": torch.tensor([0.5, 1.0, 0.75, 0.75]),
        "mse": torch.tensor([1.0, 0.0, 2.0, 1.0]),
        "relative_error": torch.tensor([0.5, 0.0, 0.5, 1.0]),
        "full_cosine": torch.tensor([0.25, 0.75, 0.5, 0.5]),
        "rank": torch.tensor([1, 2, 8, 4]),
        "steps": torch.tensor([1, 2, 2, 4], dtype=torch.int32),
    }
    assert score(figures) == Scores(
        pairs=4,
        cosine=0.75,
        mse=1.0,
        relative_error=0.5,
        full_cosine=0.5,
        rank1=0.25,
        rank1_interval=wilson(1, 4),
        top5=0.75,
        reciprocal_rank=(1 + 1 / 2 + 1 / 8 + 1 / 4) / 4,
        steps=2.25,
    )


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    # Published examples (Newcombe 1998, table I), and the limits of no and only successes.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (29, 29, 0.8830, 1.0)],
)
def test_wilson_interval(successes: int, total: int, low: float, high: float) -> None:
    assert wilson(successes, total) == pytest.approx((low, high), abs=5e-5)
    assert wilson(0, 0) == (0.0, 1.0)


def test_operations_are_counted_in_arithmetic_problems_alone() -> None:
    assert value_of({"problem": "7+5*3-8"}, "operations") == 3
    assert value_of({"problem": "12*9", "operations": 4}, "operations") == 4
    assert value_of({"problem": "What is 7+5?"}, "operations") is None
    assert value_of({"thinking_tokens": 9}, "thinking_tokens") == 9


def test_few_values_are_groups_and_many_are_quartiles() -> None:
    assert group_labels([3, 1, None, 3]) == ["3", "1", "unknown", "3"]
    assert group_labels(["b", "a"]) == ["b", "a"]
    labels = group_labels(list(range(1, 21)))
    assert list(dict.fromkeys(labels)) == ["1 to 5", "6 to 10", "11 to 15", "16 to 20"]
    assert [labels.count(label) for label in dict.fromkeys(labels)] == [5, 5, 5, 5]
    skewed = group_labels([1] * 60 + list(range(2, 20)))
    assert skewed[:60] == ["1"] * 60
    assert skewed[-1] == "2 to 19"


class Setup:
    """A tiny recursion, compressor and head, and two folders of pairs."""

    def __init__(self, folder: Path, samples: int = 13) -> None:
        self.trm = SequenceTRM(
            D_COMPRESSED, n_layers=1, n_heads=2, n_latent_steps=1, n_deep_recursions=1
        ).eval()
        self.compressor = DimensionCompressor(D, D_COMPRESSED).requires_grad_(False)
        self.head = nn.Linear(D, VOCABULARY, bias=False)
        self.train = write_pairs(folder / "train", samples=20, seed=1)
        self.pairs = write_pairs(folder / "test", samples=samples, seed=2)

    def evaluate(self, **options: object) -> Phase2Evaluation:
        settings = {"head": self.head, "train_pairs": self.train, "max_steps": 3, "batch_size": 4} | options
        return evaluate_phase2(self.trm, self.compressor, self.pairs, **settings)  # type: ignore[arg-type]


def pairs_of(pairs: PairFiles) -> list[tuple[Tensor, Tensor, int]]:
    """Context, true state and next token of every pair."""
    return [
        (
            shard.hidden_pre[shard.offsets[i] : shard.offsets[i + 1]].float(),
            shard.hidden_post[i].float(),
            record["next_token"],
        )
        for shard in pairs.shards()
        for i, record in enumerate(shard.records)
    ]


@torch.no_grad()
def test_evaluation_equals_one_pair_at_a_time(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    found = setup.evaluate()
    assert list(found.rows) == [TRM, LAST_STATE, TRAINING_MEAN, RIDGE, TRUE_STATE]
    states, lasts, steps = [], [], []
    for context, _, _ in pairs_of(setup.pairs):
        compressed = setup.compressor(context)[None]
        reasoning = setup.trm.reason(compressed, max_steps=3)
        states.append(reasoning.state[0])
        steps.append(int(reasoning.steps[0]))
        lasts.append(compressed[0, -1])
    true = torch.stack([state for _, state, _ in pairs_of(setup.pairs)])
    tokens = torch.tensor([token for _, _, token in pairs_of(setup.pairs)])
    targets = setup.compressor(true)
    mean = torch.stack([setup.compressor(state) for _, state, _ in pairs_of(setup.train)]).mean(0)
    expected = {
        TRM: torch.stack(states),
        LAST_STATE: torch.stack(lasts),
        TRAINING_MEAN: mean.expand_as(targets),
        TRUE_STATE: targets,
    }
    for name, predicted in expected.items():
        figures = measure(predicted, targets, true, setup.compressor, setup.head, tokens)
        for key, value in vars(score(figures)).items():
            if key != "steps":
                assert getattr(found.rows[name], key) == pytest.approx(value, abs=1e-5), (name, key)
    assert found.rows[TRM].steps == sum(steps) / len(steps)
    assert found.rows[TRUE_STATE].cosine == pytest.approx(1.0)
    assert found.rows[TRUE_STATE].mse == 0.0
    assert found.ridge_strength is not None


def test_groups_partition_the_pairs(tmp_path: Path) -> None:
    found = Setup(tmp_path).evaluate(by="operations")
    assert list(found.groups) == ["1", "2", "3"]
    whole = found.rows[TRM]
    parts = [rows[TRM] for rows in found.groups.values()]
    assert sum(part.pairs for part in parts) == whole.pairs == 13
    assert sum(part.mse * part.pairs for part in parts) / 13 == pytest.approx(whole.mse)
    assert (
        json.loads(json.dumps(found.to_json(), allow_nan=False))["groups"]["2"][TRM]["pairs"]
        == parts[1].pairs
    )


def test_neither_baselines_nor_tokens_are_needed(tmp_path: Path) -> None:
    found = Setup(tmp_path).evaluate(head=None, train_pairs=None)
    assert list(found.rows) == [TRM, TRUE_STATE]
    assert found.rows[TRM].rank1 is None
    assert found.ridge_strength is None


@pytest.mark.parametrize("halting", ["batch", "none"])
def test_without_halting_all_steps_are_taken(tmp_path: Path, halting: str) -> None:
    setup = Setup(tmp_path)
    nn.init.constant_(setup.trm.halt_head.bias, -50.0 if halting == "batch" else 50.0)
    assert setup.evaluate(halting=halting).rows[TRM].steps == 3.0


def test_invalid_weights_give_no_metrics(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    nn.init.constant_(setup.trm.output_norm.weight, float("nan"))
    found = setup.evaluate()
    assert math.isnan(found.rows[TRM].cosine)
    assert found.rows[TRM].rank1 == 0.0
    assert found.to_json()["rows"][TRM]["mse"] is None


def test_invalid_evaluations_are_rejected(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    with pytest.raises(InputError, match="--by colour"):
        setup.evaluate(by="colour")
    with pytest.raises(InputError, match="the model has 2 tokens"):
        setup.evaluate(head=nn.Linear(D, 2))
    setup.pairs = write_pairs(tmp_path / "none", samples=0)
    with pytest.raises(InputError, match="has no pairs"):
        setup.evaluate()


def test_progress_counts_training_and_held_out_pairs(tmp_path: Path) -> None:
    done: list[int] = []
    Setup(tmp_path).evaluate(progress=done.append)
    assert sum(done) == 20 + 13
