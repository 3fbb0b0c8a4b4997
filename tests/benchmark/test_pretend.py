"""Tests of the simulated GPU: a plan runs to completion, and finds every kernel in its cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu.cache import FOLDER, made_with, pack, unpack
from bench.gpu.commands import run_tests
from bench.gpu.context import Context, Event
from bench.gpu.plans import FIRST, SECOND, TUNED, Plan, Stage, Task, measured
from bench.gpu.smollm3 import SMOLLM3_3B, measure
from bench.precompile import MOST_BYTES, fill, unhurried
from llm_trm.benchmark.results import read
from llm_trm.benchmark.workloads import Case

ROOT = Path(__file__).parents[2]
FIRST_CASE = Case("forward", 256, 256, dtype="bfloat16")


@pytest.fixture(autouse=True)
def _compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Child processes compile; this process keeps the interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(ROOT)


def _carried(plan: Plan, folder: Path, tmp_path: Path) -> dict[str, Any]:
    """Fill and copy a cache, run the plan again, and return the second run's summary."""
    first = fill(plan, folder, tmp_path / "one")
    assert not first.outcome.red and not first.outcome.left_out
    assert first.compiled["gemm_kernel"] > 0
    size = pack(folder, tmp_path / "cache.tar.xz")
    assert size < MOST_BYTES
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    assert unpack(tmp_path / "cache.tar.xz") == (folder, [])
    second = fill(plan, folder, tmp_path / "two")
    assert second.compiled == {} and not second.outcome.red
    summary = list(read(tmp_path / "two" / "gpu.jsonl"))[-1]
    assert summary["cache"] == {"hits": second.hits, "compiled": {}}
    assert second.hits >= first.compiled.total()
    return summary


def test_plan_hits_the_copied_cache(tmp_path: Path) -> None:
    small = replace(FIRST_CASE, hidden_size=64, latents=32, heads=2, layers=1)
    check = next(task for task in FIRST.tasks if task.name == "smoke: graph")
    names = ("eager", "compile", "triton", "triton+graph", "triton-fp8+graph", "native")
    case = measured(small, names, seconds=25.0, timed=0.01)
    stages = (FIRST.stages[0], Stage("all", 300.0, (check, case)))
    summary = _carried(unhurried(Plan(stages, 470.0)), tmp_path / "triton", tmp_path)
    assert summary["machine"]["device"] == "pretended H100"
    (line,) = (line for line in read(tmp_path / "two" / "gpu.jsonl") if "rows" in line)
    statuses = {row["backend"]: row["status"] for row in line["rows"]}
    assert statuses == dict.fromkeys(names, "ok") | {"native": "not run"}
    rows = [row["backend"] for row in read(tmp_path / "two" / "rows.jsonl")]
    assert rows.count("triton+graph") == 3, "checked, timed before compilation, and timed with all"
    assert rows.count("compile") == 2


@pytest.mark.slow
def test_first_plan_hits_the_copied_cache(tmp_path: Path) -> None:
    """The complete plan at full size with tuning, which takes eight minutes on two cores."""
    plan = unhurried(FIRST, processes=os.cpu_count() or 1)
    summary = _carried(plan, tmp_path / "triton", tmp_path)
    assert set(summary["done"]) == {task.name for task in plan.tasks}
    (table,) = (tmp_path / "two" / "tables").iterdir()
    assert json.loads(table.read_text())["entries"]
    tuned = list(read(tmp_path / "two" / "tuned.jsonl"))
    assert [[row["backend"] for row in line["rows"]] for line in tuned] == [list(TUNED)] * 5
    assert len([path for path in (tmp_path / "two").rglob("*") if path.is_file()]) <= 6, (
        "8 come back, with the log"
    )


@pytest.mark.slow
def test_the_second_plan_runs_to_its_end(tmp_path: Path) -> None:
    """Except the device tests, which need a real GPU, and the cases of the benchmark."""
    plan = unhurried(SECOND, ("tests", "rest"))
    supervisor = fill(plan, tmp_path / "triton", tmp_path / "out")
    assert supervisor.outcome.done == [task.name for task in plan.tasks]


def test_device_tests_are_reported_by_name(tmp_path: Path) -> None:
    source = "import pytest\n\npytestmark = pytest.mark.interpreter\n\n\n"
    source += (
        "def test_good() -> None:\n    pass\n\n\ndef test_bad() -> None:\n    raise RuntimeError('wrong')\n"
    )
    # In tests/, where pytest looks for names.
    place = ROOT / "tests" / f"test_made_up_{os.getpid()}.py"
    events: list[Event] = []
    task = Task("tests", "tests", {"files": [str(place.relative_to(ROOT))]}, 100.0, 1.0)
    place.write_text(source)
    try:
        with pytest.raises(AssertionError, match=r"1 device tests failed: .*test_bad"):
            run_tests(Context(task, time.monotonic() + 100.0, events.append, tmp_path))
    finally:
        place.unlink()
    line = events[-1]["line"]
    assert (line["passed"], line["ok"], line["code"]) == (1, False, 1)
    assert [name.rpartition("::")[2] for name in line["failed"]] == ["test_bad"]
    assert "wrong" in (tmp_path / "gpu-tests.txt").read_text()


def test_cache_of_another_machine_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "triton"
    folder.mkdir()
    (folder / "kernel.json").write_text("{}")
    here = made_with()
    monkeypatch.setattr("bench.gpu.cache.made_with", lambda: here | {"triton": "0.1"})
    pack(folder, tmp_path / "cache.tar.xz")
    monkeypatch.setattr("bench.gpu.cache.made_with", lambda: here)
    assert unpack(tmp_path / "cache.tar.xz") == (folder, [f"triton {here['triton']}, not 0.1"])


@pytest.mark.parametrize("content", [b"", b"no archive", None])
def test_invalid_cache_is_rejected(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "cache.tar.xz").write_bytes(content)
    with pytest.raises(ValueError, match="is not a cache packed by"):
        unpack(tmp_path / "cache.tar.xz")
    assert FOLDER.is_absolute()


def test_smollm3_runs_at_a_small_size() -> None:
    """The results are real here; the simulated GPU skips the recursion."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "vocab_size": 300}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
    begun: list[str] = []
    line = measure(SMOLLM3_3B | sizes | heads, torch.device("cpu"), begun.append, problems=2, new_tokens=4)
    assert begun == ["building the model", "datagen", "warm-up", "generate"]
    assert line["tokens_per_s"] > 0 and line["generate seconds"] > 0


def test_a_module_runs_on_the_pretended_gpu(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(
        "import sys, torch\n"
        "x = torch.ones(2, 3, device='cuda').to(torch.bfloat16)\n"
        "print(x.device, x.is_cuda, (x @ x.t()).cpu().tolist(), torch.cuda.get_device_name(), sys.argv[1:])\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    command = [sys.executable, "-m", "bench.pretend"]
    done = subprocess.run(
        [*command, "module", "-x"], capture_output=True, text=True, env=environment, timeout=120, check=True
    )
    assert done.stdout == "cuda:0 True [[1.0, 1.0], [1.0, 1.0]] pretended H100 ['-x']\n"
    bare = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert bare.returncode == 2 and "usage" in bare.stderr
