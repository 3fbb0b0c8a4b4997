"""Tests of ``python -m bench.training`` at tiny sizes: its run, its comparison and its errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bench.training
from bench.plain_trainer import PlainAverage, PlainTrainer
from bench.training import (
    CASES,
    DisagreementError,
    OurTrainer,
    TrainingCase,
    check,
    describe,
    main,
    quick,
    run_case,
)
from llm_trm.benchmark.results import read

pytest.importorskip("accelerate")

CPU = torch.device("cpu")
TINY = TrainingCase(width=16, length=9, batch=3, batches=2, supervision_steps=1)


def test_trainers_agree(tmp_path: Path) -> None:
    agreement = check(TINY, CPU, tmp_path)
    assert set(agreement) == {"metrics", "updates", "averages"}
    assert max(agreement.values()) < 1e-3
    low = check(replace(TINY, dtype="bfloat16"), CPU, tmp_path / "bf16")
    assert set(low) == {"metrics"}
    assert low["metrics"] > agreement["metrics"]


@pytest.mark.parametrize("fault", ["other clipping", "no average", "other weight of the halting loss", "NaN"])
def test_trainers_that_differ_are_not_timed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(ours: OurTrainer, case: TrainingCase) -> PlainTrainer:
        trainer = plain_of(ours, case)
        if fault == "other clipping":
            trainer.clip_norm = 1e-4
        elif fault == "no average":
            monkeypatch.setattr(PlainAverage, "update", lambda _: None)
        elif fault == "NaN":
            torch.nn.init.constant_(trainer.model.output_norm.weight, float("nan"))
        else:
            trainer.halt_weight = 0.25
        return trainer

    plain_of = bench.training.plain_of
    monkeypatch.setattr(bench.training, "plain_of", broken)
    with pytest.raises(DisagreementError, match="after 6 supervision steps"):
        run_case(TINY, CPU, 0.1)


def test_disagreement_ends_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def disagree(*_: object) -> None:
        raise DisagreementError("the trainers differ")

    monkeypatch.setattr(bench.training, "check", disagree)
    out = tmp_path / "training.jsonl"
    with pytest.raises(SystemExit) as stopped:
        main(["--quick", "--device", "cpu", "--out", str(out)])
    assert stopped.value.code == 1
    assert not out.exists()
    assert capsys.readouterr().err == "bench.training: the trainers differ\n"


def test_both_train_on_the_same_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[float]] = {"plain": [], "ours": []}
    train_batch, run = PlainTrainer.train_batch, OurTrainer.run

    def plain(self, contexts, targets):  # type: ignore[no-untyped-def]
        seen["plain"] += [float(target.sum()) for target in targets]
        return train_batch(self, contexts, targets)

    def ours(self, batches):  # type: ignore[no-untyped-def]
        seen["ours"] += [float(t.sum()) for numbers in batches for t in self.samples(numbers)[1]]
        run(self, batches)

    monkeypatch.setattr(bench.training, "check", lambda *_: {"metrics": 0.0})
    monkeypatch.setattr(bench.training, "_warm", lambda call, _: 1.0)
    monkeypatch.setattr(PlainTrainer, "train_batch", plain)
    monkeypatch.setattr(OurTrainer, "run", ours)
    line = run_case(TINY, CPU, 0.1)
    assert sorted(seen["plain"]) == sorted(seen["ours"])
    assert len(set(seen["plain"])) == TINY.samples
    assert len(seen["plain"]) == TINY.samples * line["trainers"]["plain"]["rounds"]


def test_lengths_are_between_a_third_and_the_maximum(tmp_path: Path) -> None:
    lengths = OurTrainer(TrainingCase(16, 24, 20), tmp_path, CPU).trainer.inputs.contexts.lengths
    assert min(lengths) == 8
    assert max(lengths) == 24
    assert len(lengths) == 81  # one is held out


def test_quick_cases_are_tiny() -> None:
    for case in (*CASES["cpu"], *CASES["cuda"]):
        small = quick(case)
        assert max(small.width, small.length) <= 32
        assert small.samples * small.supervision_steps <= 8
        assert small.dtype == case.dtype


def test_command_appends_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(CASES, "cpu", (TINY, TINY))
    out = tmp_path / "training.jsonl"
    main(["--quick", "--device", "cpu", "--out", str(out), "--commit", "abc"])
    (line,) = read(out)
    assert line["commit"] == "abc"
    assert "rows" not in line  # otherwise bench.report would read it as a case of the kernels
    case = TrainingCase(**line["case"])
    assert case == TINY
    for figures in line["trainers"].values():
        assert figures["p20_ms"] <= figures["median_ms"] <= figures["p80_ms"]
        assert figures["samples_per_s"] == pytest.approx(1e3 * case.samples / figures["median_ms"])
    plain, ours = line["trainers"]["plain"], line["trainers"]["llm-trm"]
    assert line["ratio"] == pytest.approx(plain["median_ms"] / ours["median_ms"])
    assert describe(line) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--case", "9"], "cases 1 to 3"),
        (["--seconds", "0"], "positive"),
        (["--dropout", "1"], "[0, 1)"),
        (["--out", "/no/such/folder/x.jsonl"], "does not exist"),
    ],
)
def test_nonsense_is_refused(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--device", "cpu", *arguments])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
