"""Tests of the fp8 study: its task, its results, and its tables."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from bench.fp8 import report
from bench.fp8.study import MODES, TRAININGS, Settings, run
from bench.fp8.task import CLUES, sources
from bench.report import BEGIN, END
from llm_trm.benchmark.results import append

SETTINGS = Settings(width=16, layers=1, heads=2, n=1, T=2, supervision=2, batches=2, batch=4, tested=8)


def test_puzzles_have_one_solution_and_tests_are_held_out() -> None:
    training, testing = sources()
    assert len(training.all) == 288
    assert not set(map(tuple, training.chosen.tolist())) & set(map(tuple, testing.chosen.tolist()))
    puzzles, solutions = testing.draw(50, torch.Generator().manual_seed(0))
    clues = (puzzles > 0).sum(dim=1)
    assert CLUES[0] <= clues.min() and clues.max() <= CLUES[1]
    for puzzle, solution in zip(puzzles, solutions, strict=True):
        given = puzzle > 0
        fitting = training.all[(training.all[:, given] == puzzle[given]).all(dim=1)]
        assert torch.equal(fitting, solution[None])


def test_a_run_and_its_tables(tmp_path: Path) -> None:
    results = tmp_path / "bench" / "results" / "fp8.jsonl"
    results.parent.mkdir(parents=True)
    lines = [run("seed", 0, training, SETTINGS, torch.device("cpu"), "abc") for training in TRAININGS]
    for line in lines:
        assert set(line["evaluation"]) == set(MODES)
        found = line["evaluation"]
        assert found["float32"]["y last"] < 1e-4 < found["bf16"]["y last"] < found["fp8"]["y last"] < 0.5
        append(results, line)
    assert lines[0]["training_loss"] != lines[1]["training_loss"], "fp8 was not used in training"

    document = tmp_path / "docs" / "fp8.md"
    document.parent.mkdir()
    document.write_text(f"before {BEGIN} old {END} after")
    assert report.draw(tmp_path, results)
    text = document.read_text()
    assert text.startswith("before ") and text.endswith(" after") and " old " not in text
    assert "fp8 emulated" in text and "commit abc" in text
    assert "Speed: not measured yet." in text
    assert all(f"| {mode} |" in text for mode in MODES)

    later = json.loads(json.dumps(lines[0] | {"training_loss": 7.25}))
    append(results, later)
    assert report.draw(tmp_path, results)
    assert "7.2500" in document.read_text()
