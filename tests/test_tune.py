"""``llm-trm tune``: recording, candidates, measurements and tables, with timers that need no GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("triton", reason="triton is not installed")

from llm_trm.benchmark.workloads import Case
from llm_trm.cli import main
from llm_trm.tuning import compiling, timing
from llm_trm.tuning.calls import RecordedCall, empty, input_sets, random
from llm_trm.tuning.candidates import candidates
from llm_trm.tuning.recording import record_cases
from llm_trm.tuning.timing import Times, measure_on
from llm_trm.tuning.tuner import open_table, pending, tune
from tests.cuda_double import FakeCuda
from trm_kernels import ops
from trm_kernels.graphs import CaptureError, CudaCapturer
from trm_kernels.ops import aot, dispatch
from trm_kernels.ops._launch import LAUNCHES, TARGETS, Launch, Target
from trm_kernels.ops.dispatch import choose
from trm_kernels.ops.tiles import Choice, Tile, flaw, heuristic

TARGET = replace(TARGETS["sm_90"], name="NVIDIA H100 80GB HBM3")
CASE = Case("train", 256, 256, dtype="bfloat16")
RUN = {"time": "2026-01-01", "commit": None, "versions": {"triton": "3.6.0"}}


@pytest.fixture(scope="module")
def calls() -> list[RecordedCall]:
    return record_cases([CASE], TARGET)


def compiles(call: RecordedCall, choices: Sequence[Choice], target: Target) -> list[str | None]:
    return [None] * len(choices)


def test_a_recursion_uses_every_kind_of_product(calls: list[RecordedCall]) -> None:
    assert {call.problem.kernel for call in calls} >= {
        "gemm", "activation_gradient", "norm_gradient", "weight_gradient"
    }  # fmt: skip
    assert len({dispatch.key(call.problem) for call in calls}) == len(calls)
    # Projections of queries, keys and values, and both halves of the MLP.
    forward = {(c.problem.N, c.problem.K) for c in calls if c.problem.kernel == "gemm"}
    assert forward >= {(768, 256), (256, 256), (1024, 256), (256, 1024)}


@pytest.mark.parametrize("family", ["scratch", "paper"])
@pytest.mark.parametrize("mode", ["forward", "step"])
def test_other_families_and_training_steps_are_recorded(family: str, mode: str) -> None:
    case = Case(mode, 128, 40, batch=3, heads=4, family=family, dtype="bfloat16")  # type: ignore[arg-type]
    assert record_cases([case], TARGET)


def test_candidates_fit_and_begin_with_the_heuristic(calls: list[RecordedCall]) -> None:
    for call in calls:
        found = candidates(call.problem, TARGET)
        assert found[0] == heuristic(call.problem, TARGET)
        assert len(found) == len(set(found))
        assert 2 <= len(found) <= 100, (call.problem, len(found))
        assert all(flaw(call.problem, choice, TARGET) is None for choice in found)


def test_the_fastest_candidate_is_written_and_chosen(
    calls: list[RecordedCall], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRM_TABLES", str(tmp_path))
    dispatch.refresh()
    path = dispatch.user_path(TARGET.name)

    def measure(call: RecordedCall, choices: Sequence[Choice]) -> Times:
        return Times({choice: 1.0 / (1 + number) for number, choice in enumerate(choices)})

    table = open_table(path, TARGET)
    done = list(tune(calls, TARGET, table, path, compiles, measure, RUN, budget=60))
    assert len(done) == len(calls)
    dispatch.refresh()
    for call, tuned in zip(calls, done, strict=True):
        last = candidates(call.problem, TARGET)[-1]
        assert tuned.entry is not None
        assert choose(call.problem, TARGET) == tuned.entry.choice == last
        assert tuned.entry.heuristic_ms == 1.0
    assert not pending(calls, open_table(path, TARGET))
    monkeypatch.undo()
    dispatch.refresh()


def test_an_interrupted_run_resumes(calls: list[RecordedCall], tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    seconds = iter(range(1000))
    measured: list[str] = []

    def measure(call: RecordedCall, choices: Sequence[Choice]) -> Times:
        measured.append(dispatch.key(call.problem))
        return Times(dict.fromkeys(choices, 1.0))

    arguments = (path, compiles, measure, RUN)
    table = open_table(path, TARGET)
    list(tune(calls, TARGET, table, *arguments, budget=4, clock=lambda: next(seconds)))
    first = len(measured)
    assert 0 < first < len(calls)
    assert len(open_table(path, TARGET).entries) == first
    table = open_table(path, TARGET)
    list(tune(pending(calls, table), TARGET, table, *arguments, budget=1e9))
    assert len(measured) == len(set(measured)) == len(calls)
    # An entry from another version of its kernel is measured again.
    content = json.loads(path.read_text())
    content["entries"][measured[0]]["source"] = "0" * 12
    path.write_text(json.dumps(content))
    assert [dispatch.key(c.problem) for c in pending(calls, open_table(path, TARGET))] == measured[:1]


def test_failing_candidates_are_dropped(calls: list[RecordedCall], tmp_path: Path) -> None:
    path = tmp_path / "table.json"

    def nothing(call: RecordedCall, choices: Sequence[Choice]) -> Times:
        return Times(failures=dict.fromkeys(choices, "out of memory"))

    def spills(call: RecordedCall, choices: Sequence[Choice], target: Target) -> list[str | None]:
        return ["spills 944 bytes a thread"] * len(choices)

    table = open_table(path, TARGET)
    (failed,) = tune(calls[:1], TARGET, table, path, compiles, nothing, RUN, budget=60)
    assert (failed.entry, failed.tried, failed.reason) == (None, 0, "out of memory")
    (spilled,) = tune(calls[:1], TARGET, table, path, spills, nothing, RUN, budget=60)
    assert (spilled.entry, spilled.reason) == (None, "spills 944 bytes a thread")
    assert not path.exists()


def test_another_devices_table_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    open_table(path, TARGET).write(path)
    with pytest.raises(dispatch.TableError, match="measured on"):
        open_table(path, replace(TARGET, name="NVIDIA H200"))


@pytest.mark.interpreter
def test_recorded_calls_run_again_with_a_choice(device: str) -> None:
    case = Case("train", 32, 20, batch=2, layers=1, heads=2, steps=1, dtype="float32")
    interpreted = Target("interpreter", 0, 1, 1 << 30)
    choice = Choice("triton", Tile(32, 32, 32, 4, 1))
    clock = iter(range(1, 1000))
    measure = measure_on(
        torch.device(device), lambda call, first, count: float(call(first) is None or next(clock))
    )
    for call in record_cases([case], interpreted):
        before = sum(LAUNCHES.values())
        times = measure(call, [choice])
        assert times.ms and not times.failures, (call.problem, times.failures)
        assert sum(LAUNCHES.values()) > before


def test_a_candidate_that_cannot_be_captured_does_not_spoil_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda, device = FakeCuda(monkeypatch), torch.device("cpu")
    capturer = CudaCapturer()
    calls: list[object] = []

    def fails() -> None:
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()

    choice = Choice("triton", Tile(64, 64, 64, 4, 3))
    with pytest.raises(CaptureError, match="not permitted"):
        timing._captured([fails], choice, capturer, device)
    assert torch.cuda.current_stream() is cuda.default
    replay = timing._captured([lambda: calls.append(None)], choice, capturer, device)
    assert len(calls) == 32, "one warm-up and one capture of 16 calls each"
    replay(0)


def test_inputs_are_random_and_exceed_the_cache(calls: list[RecordedCall]) -> None:
    for call in calls:
        assert input_sets(call, 1 << 20) * call.bytes >= min(2 << 20, 16 * call.bytes)
        assert input_sets(call, 0) == 1
        for spec in call.tensors:
            tensor = random(spec, torch.device("cpu"))
            like = empty(spec)
            assert (tensor.shape, tensor.stride(), tensor.dtype) == (like.shape, like.stride(), like.dtype)
            assert tensor.float().abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({"stack": 536}, None),
        ({"stack": 8, "spills_in_loop": True}, "spills in a loop, 8 bytes per thread"),
        ({"shared_memory": TARGET.shared_memory + 1}, f"needs {TARGET.shared_memory + 1} bytes"),
        ({"hazards": ("an operand of a product",)}, "would race: an operand"),
    ],
)
def test_candidates_not_worth_timing(
    change: dict[str, Any],
    refused: str | None,
    calls: list[RecordedCall],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    good = aot.Compiled(TARGET.shared_memory, 0, spills_in_loop=False, registers=9, wgmma=True, hazards=())
    compiled: list[Launch] = []
    monkeypatch.setattr(compiling, "_compiled", lambda launch, target: compiled.append(launch))
    monkeypatch.setattr(aot, "inspect", lambda compiled, target: replace(good, **change))
    reason = compiling.refusal(calls[0], heuristic(calls[0].problem, TARGET), TARGET)
    assert reason is None if refused is None else str(reason).startswith(refused)
    assert compiled


_COMPILE = """
import json, os
if __name__ == "__mp_main__":  # what a worker sees before anything could import torch
    print("worker", os.environ["CUDA_VISIBLE_DEVICES"], os.environ["HIP_VISIBLE_DEVICES"], flush=True)
from tests.test_tune import CASE, TARGET, record_cases
from llm_trm.tuning.compiling import ParallelCompiler
from trm_kernels.ops.tiles import Activation, Choice, Tile
if __name__ == "__main__":
    # The first tile, one of sm_90's largest, spills outside of its loop, in the epilogue with GELU.
    call = next(call for call in record_cases([CASE], TARGET) if call.problem.activation == Activation.GELU)
    tiles = Tile(128, 256, 64, 8, 3), Tile(256, 256, 256, 8, 4)
    with ParallelCompiler(1) as compiler:
        print(json.dumps(compiler(call, [Choice("triton", tile) for tile in tiles], TARGET)))
    print("parent", os.environ["CUDA_VISIBLE_DEVICES"], "HIP_VISIBLE_DEVICES" in os.environ)
"""


def test_candidates_are_compiled_in_other_processes_that_see_no_gpu(
    compiler_environment: dict[str, str], tmp_path: Path
) -> None:
    root = Path(__file__).parent.parent
    script = tmp_path / "compile_candidates.py"
    script.write_text(_COMPILE)
    environment = {
        **compiler_environment,
        "PYTHONPATH": str(root),
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        "CUDA_VISIBLE_DEVICES": "0",
    }
    environment.pop("HIP_VISIBLE_DEVICES", None)
    result = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, cwd=root
    )
    assert result.returncode == 0, result.stderr[-2000:]
    worker, refusals, parent = result.stdout.splitlines()
    assert worker == "worker -1 -1"
    fine, unfit = json.loads(refusals)
    assert fine is None and unfit is not None
    assert parent == "parent 0 False", "the environment is unchanged"


def test_the_command_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "INTERPRET", False)
    monkeypatch.setattr(ops, "UNAVAILABLE", "no CUDA or ROCm GPU is visible")
    result = CliRunner().invoke(main, ["tune"])
    assert result.exit_code == 2
    assert "nothing can be measured here: no CUDA" in result.output
    assert len(result.output.splitlines()) == 1
    result = CliRunner().invoke(main, ["tune", "--dry-run", "--suite", "phase2"])
    assert result.exit_code == 0, result.output
    assert "gemm bfloat16 none 768x256 rows 256 batch 1" in result.output
    assert "no GPU here" in result.output.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--suite", "phase2", "--batch-size", "2"], "--batch-size and --suite cannot be used together"),
        (["--packaged", "--output", "x.json"], "cannot be used together"),
        (["--d-model", "100"], "multiple"),
    ],
)
def test_invalid_options_are_rejected(arguments: list[str], says: str) -> None:
    result = CliRunner().invoke(main, ["tune", *arguments])
    assert result.exit_code == 2
    assert says in result.output


def test_check_reports_missing_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_trm.cli.tune._target", lambda dry_run: TARGET)
    path = tmp_path / "table.json"
    result = CliRunner().invoke(main, ["tune", "--check", "--d-model", "64", "--output", str(path)])
    assert result.exit_code == 1
    assert "missing: gemm" in result.output
    assert not path.exists()
