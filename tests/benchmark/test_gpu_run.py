"""``python -m bench.gpu``: what it runs, in which order, and how it goes on after a cut."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import bench.gpu
from bench import training
from bench.gpu import Part
from bench.training import TrainingCase
from llm_trm.benchmark.environment import run_record
from llm_trm.benchmark.results import append, key_of, read
from llm_trm.benchmark.suites import Group
from llm_trm.benchmark.workloads import Case
from tests.benchmark.sample import sample_result

CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpu_run_without_a_gpu_says_so() -> None:
    command = [sys.executable, "-m", "bench.gpu", "--out", "unused", "--commit", "abc"]
    root = Path(bench.gpu.__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=root)
    assert done.returncode == 2
    assert "needs a CUDA GPU" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (root / "unused").exists()


@pytest.fixture
def gpu_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bench.gpu.Run:
    """A GPU run whose device is the CPU, and whose cases are not run."""
    monkeypatch.setattr(bench.gpu, "device_name", lambda _: "Abacus")
    monkeypatch.setattr(bench.gpu, "run_record", lambda _, commit: run_record(CPU, commit))
    return bench.gpu.Run(tmp_path, "abc", deadline=float("inf"))


def test_gpu_run_goes_on_after_a_cut(gpu_run: bench.gpu.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    done, skipped, other_commit, other_device, missing = (
        replace(sample_result().case, batch=batch) for batch in range(1, 6)
    )

    def line(case: Case, **changes: Any) -> dict[str, Any]:
        return gpu_run.record | replace(sample_result(), case=case).to_json() | changes

    append(gpu_run.results, line(done))
    append(gpu_run.results, line(skipped, rows=[{"backend": "eager", "status": "skipped"}]))
    append(gpu_run.results, line(other_commit, commit="def"))
    append(gpu_run.results, line(other_device, device="Slide rule"))
    ran: list[Case] = []
    monkeypatch.setattr(gpu_run, "case", lambda case, part: ran.append(case))
    part = Part([done, skipped, other_commit, other_device, missing])
    gpu_run.part(part)
    assert ran == [other_commit, other_device, missing]
    ran.clear()
    gpu_run.part(part, whole=True)
    assert ran == [skipped, other_commit, other_device, missing]


def test_case_measured_in_one_group_is_missing_in_another(
    gpu_run: bench.gpu.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = sample_result()
    append(gpu_run.results, gpu_run.record | result.to_json())
    ran: list[Group] = []
    monkeypatch.setattr(gpu_run, "case", lambda case, part: ran.append(part.group))
    gpu_run.part(Part([result.case]))
    gpu_run.part(Part([result.case], "peers"))
    assert ran == ["peers"]


def test_gpu_run_begins_nothing_without_time(gpu_run: bench.gpu.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_run.deadline = 0.0
    monkeypatch.setattr(gpu_run, "case", lambda case, part: pytest.fail("begun without time"))
    gpu_run.part(Part([sample_result().case]))


def test_case_is_run_and_recorded_under_its_group(
    gpu_run: bench.gpu.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_run.device, gpu_run.deadline = CPU, time.time() + 600.0
    monkeypatch.setattr(bench.gpu, "TIMED_SECONDS", 0.05)
    monkeypatch.setattr(bench.gpu, "candidates_for", lambda *_: ("eager", "official"))
    case = Case("step", 32, 8, heads=4, family="paper")
    gpu_run.part(Part([case], "peers"))
    (line,) = read(gpu_run.results)
    assert line["name"] == f"peers: {case.name}"
    assert [row["status"] for row in line["rows"]] == ["ok", "ok"]


def test_max_autotune_may_compile_longer_before_it_counts_as_hung() -> None:
    assert (
        bench.gpu._patience("compile-max") > bench.gpu._patience("compile") == bench.gpu._patience("float64")
    )


def test_gpu_run_leaves_out_what_broke_the_device(
    gpu_run: bench.gpu.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = sample_result().case
    commands: list[list[str]] = []
    monkeypatch.setattr(bench.gpu.os, "execv", lambda _, command: commands.append(command))
    gpu_run.restart(case, "triton", "illegal memory access")
    assert gpu_run.excluded(case) == {"triton": "illegal memory access"}
    assert gpu_run.excluded(replace(case, batch=9)) == {}
    assert commands[0][1:3] == ["-m", "bench.gpu"]
    assert commands[0][-1] == str(gpu_run.deadline)


def test_training_is_measured_once_unless_it_broke_the_device(
    gpu_run: bench.gpu.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, broken, wrong = (replace(training.CASES["cuda"][0], batch=batch) for batch in (1, 2, 3))
    ran: list[TrainingCase] = []

    def run_case(
        case: TrainingCase, device: torch.device, seconds: float, progress: Callable[[str], object]
    ) -> dict[str, Any]:
        ran.append(case)
        progress("timing")
        assert gpu_run.doing == (case, "timing")
        if case == wrong:
            raise training.DisagreementError("the trainers differ")
        return {"name": case.name, "device": "Abacus"}

    monkeypatch.setattr(training, "run_case", run_case)
    monkeypatch.setattr(training, "describe", lambda line: line["name"])
    monkeypatch.setattr(bench.gpu.os, "execv", lambda *_: None)
    gpu_run.restart(broken, "timing", "took too long")
    for _ in range(2):
        for case in (fast, broken, wrong):
            gpu_run.training(case)
    assert ran == [fast, wrong, wrong]
    assert gpu_run.doing is None
    assert [line["name"] for line in read(gpu_run.results)] == [fast.name]
    gpu_run.deadline = 0.0
    gpu_run.training(replace(fast, batch=4))
    assert ran == [fast, wrong, wrong]


def test_gpu_run_measures_the_most_telling_first() -> None:
    parts = [*bench.gpu.FIRST, *bench.gpu.THEN]
    keys = [key_of(case, part.group) for part in parts for case in part.cases]
    assert len(set(keys)) == len(keys)
    first = [case for part in bench.gpu.FIRST for case in part.cases]
    assert {part.group for part in bench.gpu.FIRST} == {"main"}
    assert {case.dtype for case in first} == {"bfloat16"}
    assert {case.mode for case in first} == {"forward", "train", "step"}
    assert first[0] == Case("forward", 256, 256, dtype="bfloat16")
    cases = [case for part in parts for case in part.cases]
    assert {case.dtype for case in cases} == {"bfloat16", "float32", "float16"}
    assert {"peers", "scaling"} <= {part.group for part in bench.gpu.THEN}
