"""Tests that ``python -m bench.gpu`` ends in time and reports each task, whatever fails or hangs.

Plans run with a clock that only tasks advance, and with children that are not processes.
"""

from __future__ import annotations

import heapq
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bench.puzzle_report
import bench.report
from bench.gpu import smoke
from bench.gpu.child import run_tasks
from bench.gpu.context import BrokenDeviceError, Context, Event
from bench.gpu.plans import CHECKS, FIRST, PLANS, TEST_FILES, Plan, Stage, Task, excludable, within
from bench.gpu.supervisor import Processes, Supervisor
from llm_trm.benchmark.candidates import CANDIDATES
from llm_trm.benchmark.environment import run_record
from llm_trm.benchmark.results import append, read
from tests.benchmark.sample import sample_result

ROOT = Path(__file__).parents[2]
DEVICE = {"machine": {"device": "Abacus"}}
#: Behaviours of a task, besides taking time.
BEHAVIOURS = ("well", "slow", "fails", "hangs", "dies", "breaks", "overruns")


class _HangError(BaseException):
    pass


class _DiesError(BaseException):
    pass


class FakeHost:
    """Children with a simulated clock, whose behaviour is looked up by the task's name."""

    def __init__(self, behaviours: Mapping[str, str] | None = None, start_seconds: float = 4.0) -> None:
        self.now = 1000.0
        self.behaviours = dict(behaviours or {})
        self.start_seconds = start_seconds
        self.requests: list[dict[str, Any]] = []
        self.alive: set[int] = set()
        self._events: list[tuple[float, int, int, Event]] = []

    def clock(self) -> float:
        return self.now

    def start(self, request: dict[str, Any]) -> int:
        self.requests.append(json.loads(json.dumps(request)))
        number = len(self.requests)
        self.alive.add(number)
        at = [self.now + self.start_seconds]

        def emit(event: Event) -> None:
            heapq.heappush(self._events, (at[0], len(self._events), number, event))

        def runner(context: Context) -> None:
            self._behave(context, at)

        tasks = [Task(**task) for task in request["tasks"]]
        runners = {task.kind: runner for task in tasks}
        ends = self.now + request["seconds"]
        try:
            code = run_tasks(tasks, ends, emit, Path(), request["excluded"], runners, lambda: at[0])
            emit({"event": "cache", "hits": 1, "compiled": {"gemm_kernel": 1}})
        except _HangError:
            return number
        except _DiesError:
            code = -signal.SIGSEGV
        emit({"event": "exit", "code": code})
        return number

    def _behave(self, context: Context, at: list[float]) -> None:
        task = context.task
        behaviour = self.behaviours.get(task.name, "well")
        candidates = [name for name in ("eager", "triton") if name not in context.excluded]
        for name in candidates:
            context.doing(name, 20.0)
            at[0] += 0.05 * task.seconds
            if name == "triton" or task.kind != "case":
                match behaviour:
                    case "hangs":
                        raise _HangError
                    case "dies":
                        raise _DiesError
                    case "breaks":
                        raise BrokenDeviceError(name, "an illegal memory access was encountered")
        match behaviour:
            case "fails":
                raise RuntimeError("it failed\nfor a reason")
            case "slow":
                at[0] = max(at[0], context.ends - 0.1)
            case "overruns":
                at[0] += 10 * task.seconds
        if task.kind == "probe":
            context.line({"name": "probe", "record": DEVICE})
        else:
            context.line({"name": task.name})

    def next(self, timeout: float) -> tuple[int, Event] | None:
        assert timeout >= 0
        while self._events and self._events[0][0] <= self.now + timeout:
            at, _, number, event = heapq.heappop(self._events)
            if number in self.alive:
                self.now = max(self.now, at)
                if event["event"] == "exit":
                    self.alive.remove(number)
                return number, event
        self.now += timeout
        return None

    def kill(self, child: int) -> None:
        self.alive.discard(child)


def run(
    plan: Plan, out: Path, behaviours: Mapping[str, str] | None = None, **options: Any
) -> tuple[Supervisor, FakeHost, int]:
    host = FakeHost(behaviours, **options)
    supervisor = Supervisor(plan, out, "abc", host, lambda _: None)
    return supervisor, host, supervisor.run()


def lines(out: Path) -> list[dict[str, Any]]:
    return list(read(out / "gpu.jsonl"))


@pytest.mark.parametrize("name", PLANS)
def test_plan_runs_all_tasks_within_its_time(name: str, tmp_path: Path) -> None:
    plan = PLANS[name]
    supervisor, host, code = run(plan, tmp_path)
    assert code == 0 and not supervisor.outcome.red
    order = [task.name for task in plan.tasks]
    done = [task for task in order if task in supervisor.outcome.done]
    assert done[: len(done)] == order[: len(done)], "later tasks ran before earlier ones"
    assert set(order) == {*supervisor.outcome.done, *supervisor.outcome.left_out}
    assert all(line["commit"] == "abc" and line["machine"]["device"] == "Abacus" for line in lines(tmp_path))
    assert lines(tmp_path)[-1]["name"] == "plan"
    assert lines(tmp_path)[-1]["cache"]["hits"] == len(host.requests)
    # All that is left out of the first plan would be.
    assert name == "second" or not supervisor.outcome.left_out


@settings(max_examples=60)
@given(
    name=st.sampled_from(sorted(PLANS)),
    choices=st.lists(st.sampled_from(BEHAVIOURS), min_size=8, max_size=40),
    start_seconds=st.sampled_from((0.0, 4.0, 60.0)),
)
def test_a_plan_ends_in_time_whatever_fails_or_hangs(
    name: str, choices: list[str], start_seconds: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    plan, out = PLANS[name], tmp_path_factory.mktemp("out")
    behaviours = {task.name: choices[i % len(choices)] for i, task in enumerate(plan.tasks)}
    behaviours["probe"] = "well"
    supervisor, host, code = run(plan, out, behaviours, start_seconds=start_seconds)
    assert host.now - 1000.0 <= plan.wall
    assert not host.alive, "a child outlived the plan"
    outcome = supervisor.outcome
    settled = [*outcome.done, *outcome.red, *outcome.left_out]
    assert len(settled) == len(set(settled)), "a task has two outcomes"
    stopped = any(
        stage.stops and any(task.name in outcome.red for task in stage.tasks) for stage in plan.stages
    )
    unanswered = "probe" in outcome.left_out
    assert stopped or unanswered or set(settled) == {task.name for task in plan.tasks}
    assert (code != 0) == (bool(outcome.red) or unanswered)
    assert lines(out)[-1]["name"] == "plan"
    assert {line["name"] for line in lines(out) if line.get("ok") is False} == set(outcome.red)
    for behaviour, task in ((behaviours[task.name], task) for task in plan.tasks):
        if task.name in outcome.done:
            excluded = task.kind == "case" and behaviour in ("hangs", "dies", "breaks")
            assert excluded or behaviour in ("well", "slow")


@pytest.mark.parametrize("behaviour", ["fails", "hangs", "dies", "breaks"])
def test_failed_smoke_test_ends_the_plan(behaviour: str, tmp_path: Path) -> None:
    supervisor, host, code = run(FIRST, tmp_path, {"smoke: fp8": behaviour})
    assert code == 1
    assert list(supervisor.outcome.red) == ["smoke: fp8"]
    assert {f"smoke: {name}" for name in CHECKS if name != "fp8"} <= set(supervisor.outcome.done)
    assert not any(task["kind"] == "case" for request in host.requests for task in request["tasks"])
    assert host.now - 1000.0 < 130.0


@pytest.mark.parametrize("behaviour", ["hangs", "dies", "breaks"])
def test_case_continues_without_candidate_that_broke_the_device(behaviour: str, tmp_path: Path) -> None:
    first, second = FIRST.stages[2].tasks[:2]
    supervisor, host, code = run(FIRST, tmp_path, {first.name: behaviour})
    assert code == 0
    assert {first.name, second.name} <= set(supervisor.outcome.done)
    again = next(request for request in host.requests if request["excluded"])
    assert list(again["excluded"]) == [first.name]
    assert list(again["excluded"][first.name]) == ["triton"]
    assert [task["name"] for task in again["tasks"]][:2] == [first.name, second.name]
    (crash,) = read(tmp_path / "crashes.jsonl")
    assert (crash["name"], crash["culprit"], crash["commit"]) == (first.name, "triton", "abc")


def test_hanging_step_is_killed_after_its_patience(tmp_path: Path) -> None:
    task = FIRST.stages[2].tasks[0]
    plan = Plan((FIRST.stages[0], Stage("forward", 400.0, (task,))), 410.0)
    _, host, _ = run(plan, tmp_path, {task.name: "hangs"})
    # Three starts, the probe, eager, 20 s of patience, and eager again.
    assert host.now - 1000.0 == pytest.approx(3 * 4 + 0.1 * 90 + 0.05 * 25 + 20 + 0.05 * 25, abs=1)


def test_without_a_gpu_the_exit_code_is_two(tmp_path: Path) -> None:
    supervisor, _, code = run(FIRST, tmp_path, {"probe": "fails"})
    assert code == 2 and list(supervisor.outcome.red) == ["probe"] and not supervisor.outcome.done


def test_a_device_that_does_not_answer_ends_the_plan(tmp_path: Path) -> None:
    supervisor, host, code = run(FIRST, tmp_path, start_seconds=100.0)
    assert code == 2 and supervisor.outcome.red == {"probe": "starting took too long"}
    assert len(host.requests) == 1 and host.now - 1000.0 < 90.0


def test_a_device_that_hangs_later_ends_the_plan(tmp_path: Path) -> None:
    host = FakeHost()
    real = host.start

    def start(request: dict[str, Any]) -> int:
        if len(host.requests) == len(CHECKS) + 1:  # no child gets the device from here on
            host.start_seconds = 1e6
        return real(request)

    host.start = start  # type: ignore[method-assign]
    supervisor = Supervisor(FIRST, tmp_path, "abc", host, lambda _: None)
    assert supervisor.run() == 2
    assert len(host.requests) == len(CHECKS) + 3
    assert list(supervisor.outcome.red.values()) == ["starting took too long"] * 2
    assert lines(tmp_path)[-1]["name"] == "plan" and not host.alive


def test_child_that_cannot_exit_is_abandoned(tmp_path: Path) -> None:
    """All its tasks are done, but it hangs while destroying the context."""
    for until in (60.0, 400.0):
        host = FakeHost()
        real = host.next

        def without_exit(timeout: float, real: Any = real) -> tuple[int, Event] | None:
            before = real(timeout)
            return real(timeout) if before is not None and before[1]["event"] == "exit" else before

        host.next = without_exit  # type: ignore[method-assign]
        task = FIRST.stages[2].tasks[0]
        plan = Plan((FIRST.stages[0], Stage("forward", until, (task,))), 410.0)
        supervisor = Supervisor(plan, tmp_path / str(until), "abc", host, lambda _: None)
        assert supervisor.run() == 0
        assert supervisor.outcome.done == ["probe", task.name] and not supervisor.outcome.left_out


def test_children_are_ended_when_the_supervisor_is(tmp_path: Path) -> None:
    host = FakeHost()
    supervisor = Supervisor(FIRST, tmp_path, "abc", host, lambda _: None)
    real, calls = host.next, [0]

    def interrupted(timeout: float) -> tuple[int, Event] | None:
        calls[0] += 1
        if calls[0] == 20:
            raise KeyboardInterrupt
        return real(timeout)

    host.next = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        supervisor.run()
    assert not host.alive


def test_run_resumes_after_an_interruption(tmp_path: Path) -> None:
    whole, skipped, foreign, *_ = (task.name for task in FIRST.stages[2].tasks)
    record = {"commit": "abc"} | DEVICE
    rows = [{"status": "ok"}, {"status": "skipped"}]
    append(tmp_path / "gpu.jsonl", record | {"task": whole, "rows": rows[:1]})
    append(tmp_path / "gpu.jsonl", record | {"task": skipped, "rows": rows})
    append(tmp_path / "gpu.jsonl", record | {"task": foreign, "commit": "def"})
    append(tmp_path / "gpu.jsonl", record | {"task": "smoke: seed", "ok": True})
    append(tmp_path / "gpu.jsonl", record | {"name": "smoke: fp8", "task": "smoke: fp8", "ok": False})
    supervisor, _, _ = run(FIRST, tmp_path)
    done = supervisor.outcome.done
    assert whole not in done and "smoke: seed" not in done
    assert {skipped, foreign, "smoke: fp8"} <= set(done)
    again, host, _ = run(FIRST, tmp_path)
    assert again.outcome.done == ["probe"] and len(host.requests) == 1


def test_docs_are_generated_from_a_plans_results(tmp_path: Path) -> None:
    run(FIRST, tmp_path, {FIRST.stages[2].tasks[0].name: "hangs", "puzzle trainer": "fails"})
    result = sample_result()
    record = {"time": "2026-01-01", "commit": "abc"} | run_record(torch.device("cpu"), "abc")
    append(tmp_path / "gpu.jsonl", record | result.to_json())
    few = replace(result, rows=result.rows[:1])
    append(tmp_path / "tuned.jsonl", record | few.to_json() | {"tuned": True})
    (report,) = bench.report.load(tmp_path)
    assert report.results == [result]
    assert bench.puzzle_report.text(tmp_path)


def test_the_wall_moves_all_ends(tmp_path: Path) -> None:
    plan = within(FIRST, 100.0)
    behaviours = {task.name: "slow" for task in plan.tasks if task.kind == "case"}
    supervisor, host, _ = run(plan, tmp_path, behaviours)
    assert host.now - 1000.0 <= 100.0
    assert supervisor.outcome.left_out
    supervisor, host, _ = run(within(PLANS["second"], 86400.0), tmp_path / "long")
    assert not supervisor.outcome.left_out and host.now - 1000.0 > PLANS["second"].wall


def test_plans_are_sound() -> None:
    assert set(CHECKS) == set(smoke.CHECKS)
    for plan in PLANS.values():
        names = [task.name for task in plan.tasks]
        assert len(names) == len(set(names))
        ends = [stage.until for stage in plan.stages]
        assert ends == sorted(ends) and ends[-1] <= plan.wall
        for stage in plan.stages:
            assert all(task.least <= task.seconds <= stage.until for task in stage.tasks)
        for task in plan.tasks:
            if task.kind == "case":
                assert set(task.argument["names"] or ()) <= set(CANDIDATES)
    marked = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"^(pytestmark = |@)pytest\.mark\.gpu", path.read_text(), re.MULTILINE)
    }
    assert marked and marked <= set(TEST_FILES), "every test that needs a GPU is in the plan"
    assert all((ROOT / name).is_file() for name in TEST_FILES)
    assert FIRST.wall <= 470 and PLANS["second"].wall <= 240


def test_only_candidates_are_excludable() -> None:
    shipped = FIRST.stages[2].tasks[0]
    assert excludable(shipped, "triton+graph")
    assert not any(excludable(shipped, step) for step in ("eager", "float64", "timing eager, triton"))
    everything = next(task for task in PLANS["second"].tasks if task.argument.get("group") == "peers")
    assert excludable(everything, "liger") and not excludable(everything, "float64")
    assert not excludable(FIRST.tasks[0], "triton")


_CHILD = """
import json, os, subprocess, sys, time
request = json.load(sys.stdin)
pipe = os.fdopen(int(os.environ["BENCH_GPU_EVENTS"]), "w", buffering=1)
def emit(**event):
    print(json.dumps(event), file=pipe, flush=True)
name = request["tasks"][0]["name"]
emit(event="begin", task=name)
if name == "hangs":
    import signal
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    emit(event="line", line={"name": "pids", "pids": [os.getpid(), grandchild.pid]}, file="gpu.jsonl")
    emit(event="doing", what="waiting for ever", patience=0.3)
    time.sleep(600)
if name == "dies":
    os.kill(os.getpid(), 9)
if name == "garbage":
    print("{not json", file=pipe)
emit(event="end", task=name, seconds=0.0)
"""


def test_processes_are_killed_with_their_children(tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text(_CHILD)
    tasks = tuple(Task(name, "any", {}, 30.0, 0.0) for name in ("well", "hangs", "dies", "garbage"))
    plan = Plan((Stage("all", 50.0, tasks, processes=4, alone=True),), 60.0)
    # The prefix runs a module by name; this script takes the name as an argument.
    supervisor = Supervisor(plan, tmp_path, "abc", Processes([sys.executable, str(script)]), lambda _: None)
    assert supervisor.run() == 1
    assert sorted(supervisor.outcome.done) == ["garbage", "well"]
    assert supervisor.outcome.red["hangs"] == "waiting for ever took too long"
    assert "code -9" in supervisor.outcome.red["dies"]
    pids = next(line["pids"] for line in lines(tmp_path) if line["name"] == "pids")
    deadline = time.monotonic() + 10
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline, "a process outlived the plan"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.gpu", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, env=environment)


@pytest.mark.skipif("os.path.exists('/dev/nvidia0')", reason="there is a GPU")
def test_command_without_a_gpu_fails(tmp_path: Path) -> None:
    done = _command("--out", str(tmp_path), "--commit", "abc", "--cache", "missing.tar.xz")
    assert done.returncode == 2
    assert "needs a CUDA GPU" in done.stdout
    assert "no cache: missing.tar.xz is not a cache packed by bench.precompile" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--wall", "nan"), "--wall"),
        (("--wall", "1"), "--wall"),
        (("--plan", "third"), "third"),
        (("--out", "README.md"), "--out README.md cannot be created"),
    ],
)
def test_bad_input_ends_with_one_line(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = _command("--out", str(tmp_path / "out"), *arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.jsonl"))
