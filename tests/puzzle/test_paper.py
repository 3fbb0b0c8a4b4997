"""Tests of the paper's model: its size, its predictions, its files."""

from __future__ import annotations

from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

import llm_trm.evaluate.puzzle
from llm_trm.data.puzzles.dataset import PuzzleSplit
from llm_trm.errors import InputError
from llm_trm.evaluate.puzzle import best_of, score
from llm_trm.models.puzzle.paper import PuzzleTRM, PuzzleTRMConfig, load_puzzle_model, save_puzzle_model
from tests.puzzle.toy import drawn_alike

CELLS, VOCABULARY = 6, 5


def build(bias: float = 0.0, **options: Any) -> PuzzleTRM:
    """A model whose samples halt at different steps."""
    sizes: dict[str, Any] = {
        "d_model": 16,
        "n_heads": 2,
        "puzzle_len": 1,
        "puzzle_dim": 8,
        "n_latent_steps": 1,
        "n_deep_recursions": 1,
        "max_steps": 5,
    }
    # The only one of seeds 0 to 11 with samples that halt at each of the five steps.
    model = drawn_alike(PuzzleTRM(PuzzleTRMConfig(VOCABULARY, CELLS, 3, **sizes | options)).eval(), seed=7)
    with torch.no_grad():
        model.q_head.weight.normal_()
        model.q_head.bias.fill_(bias)
        if model.config.puzzle_dim:
            model.puzzle_emb.weights.normal_()
    return model


def batch(size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    chance = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, VOCABULARY, (size, CELLS), generator=chance).to(torch.uint8)
    return tokens, torch.randint(0, 3, (size,), generator=chance)


def test_compaction_changes_neither_predictions_nor_exit_steps() -> None:
    model, (tokens, puzzles) = build(bias=-1.5), batch()
    compact, whole = (model.predict(tokens, puzzles, compact=compact) for compact in (True, False))
    assert len(set(whole.steps.tolist())) > 2
    assert torch.equal(compact.tokens, whole.tokens)
    assert torch.equal(compact.steps, whole.steps)
    torch.testing.assert_close(compact.halt_logits, whole.halt_logits)


def test_sample_halts_on_its_own_and_keeps_its_answer() -> None:
    model, (tokens, puzzles) = build(bias=-1.5), batch()
    found = model.predict(tokens, puzzles)
    steps = list(islice(model.trace(tokens, puzzles), model.config.max_steps))
    for row, exit_step in enumerate(found.steps.tolist()):
        answer, logits = steps[exit_step - 1]
        assert torch.equal(found.tokens[row], answer[row])
        assert found.halt_logits[row] == pytest.approx(float(logits[row]), abs=1e-4)
        assert all(float(earlier[row]) <= 1e-4 for _, earlier in steps[: exit_step - 1])


def test_a_higher_threshold_waits_longer() -> None:
    model, (tokens, puzzles) = build(bias=-1.0), batch()
    steps = [model.predict(tokens, puzzles, threshold=limit).steps for limit in (0.0, 0.5, 0.9)]
    assert steps[0].tolist() == [1] * len(tokens)
    assert bool((steps[1] <= steps[2]).all()) and bool((steps[1] < steps[2]).any())
    found = model.predict(tokens, puzzles, threshold=0.9)
    early = found.steps < model.config.max_steps
    assert bool((found.halt_logits[early].sigmoid() > 0.9).all()) and bool(early.any())
    with pytest.raises(ValueError, match="threshold"):
        model.predict(tokens, puzzles, threshold=1.0)


def test_without_halting_all_steps_are_taken_and_more_if_asked() -> None:
    model, (tokens, puzzles) = build(bias=50.0), batch(4)
    assert model.predict(tokens, puzzles).steps.tolist() == [1] * 4
    assert model.predict(tokens, puzzles, halting=False).steps.tolist() == [5] * 4
    found = model.predict(tokens, puzzles, halting=False, max_steps=9)
    assert found.steps.tolist() == [9] * 4
    expected, _ = model(tokens, puzzles, n_steps=9)
    assert torch.equal(found.tokens, expected.argmax(-1))


def test_the_surest_of_several_tries_counts() -> None:
    model, (tokens, puzzles) = build(bias=-3.0), batch()
    torch.manual_seed(5)
    tries = [model.predict(tokens, puzzles, noise=noise) for noise in (0.0, 2.0, 2.0)]
    torch.manual_seed(5)
    best = best_of(model, tokens, puzzles, tries=3, noise=2.0)
    logits = torch.stack([found.halt_logits for found in tries])
    assert torch.equal(best.halt_logits, logits.amax(0))
    chosen = torch.stack([found.tokens for found in tries])[logits.argmax(0), torch.arange(len(tokens))]
    assert torch.equal(best.tokens, chosen)
    assert torch.equal(best.steps, sum(found.steps for found in tries))
    assert len(set(logits.argmax(0).tolist())) > 1


def test_scores_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (tokens, puzzles) = build(bias=-1.5), batch(20)
    answers = model.predict(tokens, puzzles).tokens.clamp_min(1).to(torch.uint8)
    answers[:7] = torch.randint(1, VOCABULARY, (7, CELLS))
    split = PuzzleSplit(tokens, answers, puzzles)
    wide = score(model.predict, split, 8)
    assert 0 < wide.exact < wide.cells < 1
    monkeypatch.setattr(llm_trm.evaluate.puzzle, "widest", lambda _: torch.float32)
    narrow = score(model.predict, split, 8)
    assert asdict(narrow) == pytest.approx(asdict(wide), rel=1e-6)


def test_puzzle_embeddings_and_positions_matter() -> None:
    tokens, puzzles = batch(4)
    for positions in ("rope", "learned"):
        model = build(positions=positions)
        first, _ = model(tokens, puzzles)
        assert not torch.allclose(first, model(tokens, (puzzles + 1) % 3)[0])
        moved, _ = model(tokens.flip(1), puzzles)
        assert not torch.allclose(first.flip(1), moved, atol=1e-4)
    blind = build(positions="none", puzzle_len=0, puzzle_dim=0)
    torch.testing.assert_close(blind(tokens)[0].flip(1), blind(tokens.flip(1))[0], rtol=1e-4, atol=1e-4)


def test_predictions_amid_training_take_any_batch_and_leave_it_alone() -> None:
    model, (tokens, puzzles) = build(), batch(32)
    expected = model.predict(tokens, puzzles).tokens
    model.train()
    model.puzzle_emb.allocate(4)
    rows = model.puzzle_emb.rows
    assert torch.equal(model.predict(tokens, puzzles).tokens, expected)
    answer, _ = next(model.trace(tokens[:5], puzzles[:5]))
    assert torch.equal(answer, next(model.eval().trace(tokens[:5], puzzles[:5]))[0])
    assert rows is not None and rows is model.puzzle_emb.rows and not rows.any()


def test_halting_is_unlikely_at_first() -> None:
    model = PuzzleTRM(PuzzleTRMConfig(VOCABULARY, CELLS, d_model=16, n_heads=2, puzzle_len=1, puzzle_dim=0))
    _, halt = model(batch(2)[0])
    assert halt.tolist() == [-5.0, -5.0]
    assert 0.8 < float(model.y_init.std()) < 1.3
    assert not any("init" in name or "puzzle_emb" in name for name, _ in model.named_parameters())


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, (tokens, puzzles) = build(), batch(3)
    save_puzzle_model(model, tmp_path, task="sudoku")
    loaded, facts = load_puzzle_model(tmp_path)
    assert facts == {"task": "sudoku"} and loaded.config == model.config
    assert torch.equal(loaded(tokens, puzzles)[0], model(tokens, puzzles)[0])
    (tmp_path / "puzzle_trm.json").write_text('{"kind": "SequenceTRM", "facts": {}}')
    with pytest.raises(InputError, match="not a PuzzleTRM"):
        load_puzzle_model(tmp_path)
    (tmp_path / "puzzle_trm.json").unlink()
    with pytest.raises(InputError, match="llm-trm train puzzle"):
        load_puzzle_model(tmp_path)


@pytest.mark.parametrize(
    "options", [{"puzzle_dim": 17}, {"mixer": "tokens"}, {"max_steps": 0}, {"n_latent_steps": 0}]
)
def test_invalid_sizes(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be|does not fit"):
        build(**options)
