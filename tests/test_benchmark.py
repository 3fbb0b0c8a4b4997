"""The benchmark measures what it says: protocol, work counts, memory, errors, files, reports."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench.gpu
import bench.report
from llm_trm.benchmark import accuracy
from llm_trm.benchmark.candidates import Step, build, make_inputs, make_state, unavailable
from llm_trm.benchmark.environment import run_record
from llm_trm.benchmark.limits import Limits
from llm_trm.benchmark.memory import peak_memory
from llm_trm.benchmark.original import OriginalNetwork
from llm_trm.benchmark.protocol import MIN_ROUNDS, Call, Timing, interleave
from llm_trm.benchmark.results import CaseResult, Row, add_speedups, append, read
from llm_trm.benchmark.runner import Budget, run_case
from llm_trm.benchmark.table import markdown_table
from llm_trm.benchmark.workloads import SUITES, Case, suite
from trm_kernels.testing import UNIT_ROUNDOFF, ErrorPool

CPU = torch.device("cpu")
SMALL = Case("train", 32, 12, batch=3, heads=4)


class FakeMachine:
    """A clock that candidates advance; ``pace`` makes the machine slower as time goes by."""

    def __init__(self, pace: float = 0.0) -> None:
        self.now = 0.0
        self.pace = pace
        self.order: list[str] = []

    def clock(self) -> float:
        return self.now

    def candidate(self, name: str, seconds: float) -> Call:
        def call(i: int) -> None:
            self.order.append(name)
            self.now += seconds * (1.0 + self.pace * self.now)

        return call

    def timer(self, call: Call, first: int, count: int) -> float:
        begin = self.now
        for i in range(first, first + count):
            call(i)
        return (self.now - begin) / count


def test_candidates_take_turns_and_the_first_place_rotates() -> None:
    machine = FakeMachine()
    costs = {"a": 1.0, "b": 2.0, "c": 3.0}
    calls = {name: machine.candidate(name, cost) for name, cost in costs.items()}
    timings, failures = interleave(calls, machine.timer, costs, budget=18.0, clock=machine.clock)
    assert not failures
    assert "".join(machine.order) == "abc" + "bca" + "cab"
    assert {name: timing.samples for name, timing in timings.items()} == {
        name: (cost,) * 3 for name, cost in costs.items()
    }


def test_drift_of_the_machine_falls_on_all_candidates_alike() -> None:
    machine = FakeMachine(pace=0.02)  # three times slower at the end than at the start
    calls = {name: machine.candidate(name, 1.0) for name in ("a", "b")}
    timings, _ = interleave(calls, machine.timer, {"a": 1.0, "b": 1.0}, budget=100.0, clock=machine.clock)
    assert len(timings["a"].samples) > 10
    assert timings["a"].samples[-1] > 2 * timings["a"].samples[0]
    assert timings["a"].median == pytest.approx(timings["b"].median, rel=0.05)


def test_rounds_stop_at_the_budget_but_never_below_the_least() -> None:
    machine = FakeMachine()
    calls = {"slow": machine.candidate("slow", 50.0)}
    timings, _ = interleave(calls, machine.timer, {"slow": 50.0}, budget=1.0, clock=machine.clock)
    assert len(timings["slow"].samples) == MIN_ROUNDS
    quick = {"quick": machine.candidate("quick", 1.0)}
    timings, _ = interleave(
        quick, machine.timer, {"quick": 1.0}, budget=1e9, clock=machine.clock, max_rounds=7
    )
    assert len(timings["quick"].samples) == 7


def test_quick_candidates_are_repeated_within_a_sample_and_warmed() -> None:
    machine = FakeMachine()
    calls = {"quick": machine.candidate("quick", 1e-4)}
    timings, _ = interleave(
        calls, machine.timer, {"quick": 1e-4}, budget=10.0, clock=machine.clock, max_rounds=5
    )
    assert len(machine.order) == 20 * (1 + 5)
    assert timings["quick"].median == pytest.approx(1e-4)


def test_inputs_rotate_through_all_rounds() -> None:
    seen: list[int] = []
    interleave({"a": seen.append}, FakeMachine().timer, {"a": 1.0}, budget=0.0, clock=lambda: 0.0)
    assert seen == list(range(MIN_ROUNDS))


def test_candidate_that_fails_while_timed_leaves_the_others() -> None:
    machine = FakeMachine()

    def fails(i: int) -> None:
        raise RuntimeError("gone")

    timings, failures = interleave(
        {"bad": fails, "good": machine.candidate("good", 1.0)},
        machine.timer,
        {"bad": 1.0, "good": 1.0},
        budget=5.0,
        clock=machine.clock,
    )
    assert list(timings) == ["good"]
    assert str(failures["bad"]) == "gone"


def test_quantiles() -> None:
    timing = Timing((5.0, 1.0, 3.0, 2.0, 4.0, 6.0))
    assert timing.median == 3.5
    assert timing.p20 == 2.0
    assert timing.p80 == 5.0
    assert Timing((7.0,)).p80 == 7.0


@pytest.mark.parametrize("mode", ["forward", "train"])
def test_flops_are_those_that_pytorch_counts(mode: Any) -> None:
    case = replace(SMALL, mode=mode)
    inputs = make_inputs(case, CPU, torch.float32, 0)
    net = OriginalNetwork(case.config())
    net.load_state_dict(make_state(case, CPU, torch.float32))
    step = Step(case, net, inputs, original=True)
    net.train()  # in evaluation MultiheadAttention is one opaque operation
    with FlopCounterMode(display=False) as counter:
        step(0)
    assert case.flops == counter.get_total_flops()


def test_bytes_count_parameters_once_or_in_every_call() -> None:
    case = Case("forward", 64, 16, dtype="bfloat16")
    states = 5 * 16 * 64 * 2
    weights = 2 * case.parameters
    assert case.bytes_moved(cache_bytes=weights) == states + weights
    assert case.bytes_moved(cache_bytes=weights - 1) == states + 7 * weights
    training = replace(case, mode="train")
    assert training.bytes_moved(cache_bytes=0) == 7 * 16 * 64 * 2 + (21 + 7 + 1) * weights


def test_floor_is_the_longer_of_arithmetic_and_traffic() -> None:
    case = Case("forward", 64, 16)
    assert Limits(1e9, 1e30, 0).floor(case) == pytest.approx(case.flops / 1e9)
    assert Limits(1e30, 1e9, 0).floor(case) == pytest.approx(case.bytes_moved(0) / 1e9)


def test_peak_memory_counts_what_is_held_at_once() -> None:
    def call() -> torch.Tensor:
        a = torch.empty(1000, dtype=torch.float32)
        del a
        b = torch.empty(3000, dtype=torch.float32)
        c = torch.empty(2000, dtype=torch.float32)
        del b
        return c

    assert peak_memory(CPU, call) == pytest.approx(5000 * 4, abs=256)


def test_original_and_eager_compute_the_reference_and_its_gradients() -> None:
    state = make_state(SMALL, CPU, torch.float32)
    inputs = make_inputs(SMALL, CPU, torch.float32, 0)
    truth = accuracy.float64_truth(SMALL, state, inputs)
    for name in ("original", "eager"):
        step = build(name, SMALL, state, inputs)
        assert isinstance(step, Step), step
        step(0)
        found = dict(step.results())
        assert found.keys() == truth.keys()
        assert all(pool.error < 1e-5 for pool in accuracy.errors(found.items(), truth).values())


def test_float64_truth_in_chunks_equals_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    state = make_state(SMALL, CPU, torch.float32)
    inputs = make_inputs(SMALL, CPU, torch.float32, 0)
    whole = accuracy.float64_truth(SMALL, state, inputs)
    monkeypatch.setattr(accuracy, "_CHUNK_ELEMENTS", 1)
    for name, tensor in accuracy.float64_truth(SMALL, state, inputs).items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-12, atol=1e-12)


def test_wrong_gradient_of_one_bias_breaks_the_rule() -> None:
    state = make_state(SMALL, CPU, torch.float32)
    inputs = make_inputs(SMALL, CPU, torch.float32, 0)
    truth = accuracy.float64_truth(SMALL, state, inputs)
    eager = build("eager", SMALL, state, inputs)
    assert isinstance(eager, Step)
    eager(0)
    found = dict(eager.results())
    right = accuracy.errors(found.items(), truth)
    assert not accuracy.broken_rules(torch.float32, right, right)
    found["layers.1.mlp.2.bias"] = found["layers.1.mlp.2.bias"] * 0
    wrong = accuracy.errors(found.items(), truth)
    assert len(accuracy.broken_rules(torch.float32, wrong, right)) == 1


def test_nan_breaks_the_rule_and_is_recorded_as_null() -> None:
    pool = ErrorPool(float("nan"), 1.0)
    assert accuracy.broken_rules(torch.float32, {"output": pool}, {"output": ErrorPool(0.0, 1.0)})
    assert UNIT_ROUNDOFF[torch.float32] > 0


def test_budget_refuses_what_does_not_fit() -> None:
    now = [0.0]
    budget = Budget(100.0, 5.0, clock=lambda: now[0])
    assert budget.refuses(99.0) is None
    now[0] = 95.0
    assert budget.refuses(4.0) is None
    reason = budget.refuses(20.0)
    assert reason is not None
    assert "20 s" in reason
    assert "5 s of --budget 100" in reason


def test_interpreter_is_not_timed() -> None:
    reason = unavailable("triton", "cpu")
    assert reason is not None
    assert "GPU" in reason


def test_candidate_known_to_break_the_device_is_not_built() -> None:
    case = Case("forward", 32, 8, heads=4)
    result = run_case(case, CPU, ("eager", "compile"), Budget(60, 0.05), excluded={"compile": "it hung"})
    assert [row.status for row in result.rows] == ["ok", "failed"]
    assert result.rows[1].reason == "it hung"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", SUITES)
def test_suites_hold_valid_distinct_cases(name: str, device: str) -> None:
    cases = suite(name, device, "float32", ("forward", "train"))
    assert len({case.name for case in cases}) == len(cases) > 0
    for case in cases:
        assert case.config().d_model == case.hidden_size
        assert case.flops > 0


def _result(mode: Any = "forward", device: str = "Abacus") -> CaseResult:
    rows = [
        Row("original", "ok", None, 4.0, 3.9, 4.1, 9, 0.5, 0.1, 2**20, {"output": 1e-7}),
        Row("eager", "ok", None, 2.0, 1.9, 2.1, 9, 1.0, 0.2, 2**20, {"output": 1e-7}),
        Row("native", "wrong", "output: error 1", errors={"output": None}),
        Row("triton", "not run", "no GPU"),
    ]
    add_speedups(rows)
    return CaseResult(Case(mode, 64, 16), device, 0.4, 1.0, 10.0, rows)


def test_ratios_are_of_medians() -> None:
    original, eager, wrong, _ = _result().rows
    assert original.speedup == {"eager": 0.5}
    assert eager.speedup == {"original": 2.0}
    assert wrong.speedup == {}


def test_table_withholds_the_speed_of_a_wrong_result() -> None:
    lines = markdown_table(_result()).splitlines()
    cells = {line.split(" | ")[0].strip("| "): line for line in lines}
    assert "WRONG" in cells["native"]
    assert "NaN" in cells["native"]
    assert "2.00x" in cells["eager"]
    assert "not run" in cells["triton"]
    assert len({line.count("|") for line in lines}) == 1


def test_results_round_trip_through_a_file_that_was_cut(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    result = _result()
    append(file, {"commit": "abc"} | result.to_json())
    with file.open("a") as cut:
        cut.write('{"commit": "abc", "rows": [')
    append(file, {"commit": "def"} | result.to_json())
    lines = list(read(file))
    assert [line["commit"] for line in lines] == ["abc", "def"]
    assert CaseResult.from_json(lines[1]) == result


def test_run_record_names_the_given_commit() -> None:
    record = run_record(CPU, "0123abc")
    assert record["commit"] == "0123abc"
    assert record["versions"]["torch"] == torch.__version__
    assert json.dumps(record)


def test_report_draws_the_latest_results_between_the_markers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "docs").mkdir()
    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    for document in (tmp_path / "README.md", tmp_path / "docs" / "benchmarks.md"):
        document.write_text(f"before\n{bench.report.BEGIN}\nold\n{bench.report.END}\nafter\n")
    for day, median in (("2026-01-02", 2.0), ("2026-01-01", 7.0)):
        result = _result()
        result.rows[1].median_ms = median
        record = run_record(CPU, f"commit-of-{day}") | {"time": f"{day}T00:00:00+00:00"}
        append(results / "cpu.jsonl", record | result.to_json())
    bench.report.main(tmp_path)
    for document in (tmp_path / "README.md", tmp_path / "docs" / "benchmarks.md"):
        text = document.read_text()
        assert text.startswith("before\n")
        assert text.endswith("\nafter\n")
        assert "old" not in text
        assert "commit-of-202" in text
        assert "On a GPU: not measured yet." in text
    assert "2.00" in text
    assert "7.00" not in text
    assert (tmp_path / "docs" / "benchmarks-abacus.png").exists()


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
        replace(_result().case, batch=batch) for batch in range(1, 6)
    )

    def line(case: Case, **changes: Any) -> dict[str, Any]:
        return gpu_run.record | replace(_result(), case=case).to_json() | changes

    append(gpu_run.results, line(done))
    append(gpu_run.results, line(skipped, rows=[{"backend": "eager", "status": "skipped"}]))
    append(gpu_run.results, line(other_commit, commit="def"))
    append(gpu_run.results, line(other_device, device="Slide rule"))
    ran: list[Case] = []
    monkeypatch.setattr(gpu_run, "case", ran.append)
    gpu_run.cases([done, skipped, other_commit, other_device, missing])
    assert ran == [skipped, other_commit, other_device, missing]


def test_gpu_run_begins_nothing_without_time(gpu_run: bench.gpu.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_run.deadline = 0.0
    monkeypatch.setattr(gpu_run, "case", lambda case: pytest.fail("begun without time"))
    gpu_run.cases([_result().case])


def test_gpu_run_leaves_out_what_broke_the_device(
    gpu_run: bench.gpu.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = _result().case
    commands: list[list[str]] = []
    monkeypatch.setattr(bench.gpu.os, "execv", lambda _, command: commands.append(command))
    gpu_run.restart(case, "triton", "illegal memory access")
    assert gpu_run.excluded(case) == {"triton": "illegal memory access"}
    assert gpu_run.excluded(replace(case, batch=9)) == {}
    assert commands[0][1:3] == ["-m", "bench.gpu"]
    assert commands[0][-1] == str(gpu_run.deadline)


def test_gpu_cases_are_distinct_and_serve_all_dtypes_and_regimes() -> None:
    cases = [*bench.gpu.FIRST, *bench.gpu.THEN]
    assert len({case.name for case in cases}) == len(cases)
    assert {case.dtype for case in cases} == {"bfloat16", "float32", "float16"}
    assert {case.hidden_size for case in cases} == {256, 512, 2048}
    assert cases[0].name == Case("forward", 256, 256, dtype="bfloat16").name


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["forward", "train"])
def test_kernels_and_graph_replays_give_the_right_result(mode: Any) -> None:
    case = Case(mode, 64, 32, batch=2, heads=4)
    names = ("original", "eager", "triton", "eager+graph", "compile+graph", "triton+graph")
    result = run_case(case, torch.device("cuda"), names, Budget(300, 0.2))
    for row in result.rows:
        assert row.status == "ok", f"{row.backend}: {row.reason}"
        assert row.median_ms is not None
        assert row.peak_bytes is not None
        assert row.peak_bytes > 0
