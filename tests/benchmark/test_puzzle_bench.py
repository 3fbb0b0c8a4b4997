"""Tests of ``bench/puzzle.py`` and ``bench/puzzle_training.py``, and of their checks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import puzzle, puzzle_report, puzzle_training
from bench.plain_puzzle import PlainPuzzleTrainer
from bench.puzzle import CASES, OURS, PLAIN, DisagreementError, PuzzleCase, check, quick, run_case

CPU = torch.device("cpu")


@pytest.mark.parametrize("case", [*CASES["cpu"], *CASES["cuda"]], ids=lambda case: case.name)
def test_the_trainers_agree_on_every_kind_of_case(case: PuzzleCase, tmp_path: Path) -> None:
    small = quick(case)
    assert small.mixer == case.mixer and small.embeddings == case.embeddings
    assert check(puzzle.replace(small, dtype="float32"), CPU, tmp_path) < 1e-3


def test_a_disagreement_withholds_the_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = PlainPuzzleTrainer.step

    def wrong(self: PlainPuzzleTrainer, fresh: tuple[torch.Tensor, ...]) -> dict[str, float]:
        found = step(self, fresh)  # type: ignore[arg-type]
        return {name: 1.01 * value for name, value in found.items()}

    monkeypatch.setattr(PlainPuzzleTrainer, "step", wrong)
    with pytest.raises(DisagreementError, match="the trainers differ"):
        run_case(quick(CASES["cpu"][0]), CPU, 0.1, compiled=False)


def test_case_reports_times_hours_and_ratio() -> None:
    line = run_case(quick(CASES["cpu"][0]), CPU, 0.1, compiled=False)
    times = {name: figures["median_ms"] for name, figures in line["trainers"].items()}
    assert line["ratio"] == {PLAIN: pytest.approx(times[PLAIN] / times[OURS])}
    ours = line["trainers"][OURS]
    assert ours["hours"] == pytest.approx(65_100 * ours["median_ms"] / 3.6e6)
    assert ours["tflops"] == pytest.approx(line["tflop"] / (1e-3 * ours["median_ms"]))
    assert "against" not in puzzle.describe(line)


def test_the_paper_step_has_the_operations_of_the_issue(tmp_path: Path) -> None:
    # 32.8 TFLOP per step at L 97 with mlp_t and batch 768; counted here at batch 4.
    trainer = puzzle.ours(PuzzleCase("paper", 9, 4), tmp_path, CPU)
    assert 768 / 4 * puzzle.flops(trainer) * 1e-12 == pytest.approx(32.8, rel=0.02)


def test_a_training_run_and_its_report(tmp_path: Path) -> None:
    line = puzzle_training.train(
        4, 0, CPU, puzzles=60, held_out=20, steps=4, eval_every=2, d_model=16, n_heads=2
    )
    assert [record["step"] for record in line["history"]] == [2, 4]
    assert [mode["halting"] for mode in line["modes"]] == [False, True, True]
    assert [mode["threshold"] for mode in line["modes"]] == [0.5, 0.5, 0.9]
    assert line["modes"][0]["puzzles"] == line["held_out"] == 20
    assert "halting" in puzzle_training.describe(line)
    run = {"time": "2026-01-01", "machine": {"device_type": "cpu"}}
    steps = run | run_case(quick(CASES["cpu"][0]), CPU, 0.1, compiled=False)
    (tmp_path / puzzle_report.RUNS).write_text(json.dumps(run | line) + "\n")
    (tmp_path / puzzle_report.STEPS).write_text(json.dumps(steps) + "\n")
    text = puzzle_report.text(tmp_path)
    assert "| 4x4 | 0 |" in text and "On a GPU: not measured yet" in text
    assert f"{steps['ratio'][PLAIN]:.2f}x" in text
    puzzle_report.plot(tmp_path, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_missing_measurements_are_reported(tmp_path: Path) -> None:
    assert puzzle_report.text(tmp_path).count("Not measured yet.") == 2
