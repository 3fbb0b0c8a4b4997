"""Runs a plan in child processes, and kills each when its time is over, so that no device hang blocks it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import signal
import subprocess
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from bench.gpu.context import EVENTS, PATIENCE, Event
from bench.gpu.plans import PROBE, Plan, Stage, Task, excludable
from llm_trm.benchmark.results import append, read

#: Seconds after a task's deadline until its process is killed.
GRACE = 5.0
#: Time limit for importing torch and the first CUDA call.
START_SECONDS = 60.0
#: Number of consecutive children without a started task after which the device counts as hanging.
MAX_SILENT = 2
#: Seconds reserved at the end of the plan for the last lines.
CLOSING_SECONDS = 1.0


class Host(Protocol):
    """Starts and kills child processes, and has a clock; tests replace it with a fake."""

    def clock(self) -> float:
        """Time in seconds."""

    def start(self, request: dict[str, Any]) -> int:
        """Start a child with a request, and return its number."""

    def next(self, timeout: float) -> tuple[int, Event] | None:
        """The next event of any child, or None after ``timeout`` seconds. The last event is ``exit``."""

    def kill(self, child: int) -> None:
        """Kill a child and all its processes; it sends no further events."""


class Processes:
    """Runs children as processes.

    Args:
        prefix: Command prefix that runs a module.
        environment: Additional environment variables.
    """

    def __init__(self, prefix: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._prefix = list(prefix)
        # Part of the keys of Triton's cache; Triton 3.10 changes the default.
        self._environment = {"TRITON_DEFAULT_FP_FUSION": "1"} | os.environ | dict(environment or {})
        self._events: queue.Queue[tuple[int, Event]] = queue.Queue()
        self._running: dict[int, subprocess.Popen[str]] = {}
        self._started = 0

    def clock(self) -> float:
        return time.monotonic()

    def start(self, request: dict[str, Any]) -> int:
        self._started += 1
        number = self._started
        reading, writing = os.pipe()
        own = {
            EVENTS: str(writing),
            "PYTHONUNBUFFERED": "1",
            # Use only the heuristics and the run's own tables, on any machine.
            "TRM_TABLES": str(Path(request["out"]) / "tables"),
        }
        process = subprocess.Popen(
            [*self._prefix, "bench.gpu.child"],
            stdin=subprocess.PIPE,
            text=True,
            pass_fds=(writing,),
            env=self._environment | own,
            start_new_session=True,
        )
        os.close(writing)
        self._running[number] = process
        threading.Thread(target=self._listen, args=(number, process, reading), daemon=True).start()
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # if it died immediately, its exit event reports that
            process.stdin.write(json.dumps(request))
            process.stdin.close()
        return number

    def _listen(self, number: int, process: subprocess.Popen[str], reading: int) -> None:
        with os.fdopen(reading) as lines:
            for line in lines:
                try:
                    self._events.put((number, json.loads(line)))
                except json.JSONDecodeError:
                    continue  # incomplete, because the process ended
        self._events.put((number, {"event": "exit", "code": process.wait()}))

    def next(self, timeout: float) -> tuple[int, Event] | None:
        ends = time.monotonic() + timeout
        while True:
            try:
                number, event = self._events.get(timeout=max(ends - time.monotonic(), 0.0))
            except queue.Empty:
                return None
            if number in self._running:
                if event["event"] == "exit":
                    self.kill(number)  # also kills processes that it left running
                return number, event

    def kill(self, child: int) -> None:
        process = self._running.pop(child, None)
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@dataclass
class _Child:
    """A running child.

    Attributes:
        tasks: Its unfinished tasks, starting with the current one.
        due: Time at which its current step counts as hanging.
        ends: Time at which its current task counts as hanging.
        doing: Its current step.
        started: Whether it is running a task.
    """

    tasks: deque[Task]
    due: float
    ends: float = math.inf
    doing: str = "starting"
    started: bool = False


@dataclass
class Outcome:
    """Outcome of a plan's tasks by name, with reasons if any."""

    done: list[str] = field(default_factory=list)
    red: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


class Supervisor:
    """One run of a plan.

    Args:
        plan: The plan.
        out: Folder to append results in.
        commit: The measured commit.
        host: Starts children.
        show: Prints a line.
        patience: Factor by which steps may take longer than on a GPU before they count as hanging.
        start: Start of the plan on the host's clock; now by default.
    """

    def __init__(
        self,
        plan: Plan,
        out: Path,
        commit: str,
        host: Host,
        show: Callable[[str], None] = lambda text: print(text, flush=True),
        patience: float = 1.0,
        start: float | None = None,
    ) -> None:
        self._patience = patience
        out.mkdir(parents=True, exist_ok=True)
        self.plan, self.out, self.commit, self.host, self.show = plan, out, commit, host, show
        self.start = host.clock() if start is None else start
        self.outcome = Outcome()
        self.record: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit,
        }
        self.hits = 0
        self.compiled: Counter[str] = Counter()
        self._excluded: dict[str, dict[str, str]] = {}
        self._silent = 0

    @property
    def seconds(self) -> float:
        """Seconds since the start of the plan."""
        return self.host.clock() - self.start

    def run(self) -> int:
        """Run the plan. Returns 0, 1 if a task failed, or 2 if there is no GPU."""
        for stage in self.plan.stages:
            red = len(self.outcome.red)
            until = min(stage.until, self.plan.wall - CLOSING_SECONDS)
            self.show(f"== {self.seconds:.0f} s: {stage.name}, until {until:.0f} s")
            self._stage(stage, until)
            if stage.stops and len(self.outcome.red) > red:
                self.show(f"{stage.name} is red: the plan ends here")
                break
            if PROBE in self.outcome.left_out or self._silent >= MAX_SILENT:
                self.show("the device did not answer: the plan ends here")
                break
        self._finish()
        if PROBE in self.outcome.red or PROBE in self.outcome.left_out or self._silent >= MAX_SILENT:
            return 2
        return 1 if self.outcome.red else 0

    def _stage(self, stage: Stage, until: float) -> None:
        done = self._done_before()
        pending = []
        for task in stage.tasks:
            if task.name in done:
                self.show(f"already there: {task.name}")
            else:
                pending.append(task)
        waiting = deque([[task] for task in pending] if stage.alone else [pending] if pending else [])
        running: dict[int, _Child] = {}
        left_out = self.outcome.left_out
        before = len(left_out)
        try:
            self._until(until, stage.processes, waiting, running)
        finally:
            for number in running:
                self.host.kill(number)
        for child in running.values():
            left_out |= {task.name: "no time was left" for task in child.tasks}
            if child.tasks:
                left_out[child.tasks[0].name] = f"cut off, at {child.doing}"
        left_out |= {task.name: "no time was left" for tasks in waiting for task in tasks}
        if len(left_out) > before:
            name, reason = list(left_out.items())[before]
            others = len(left_out) - before - 1
            self.show(f"left out: {name}{f' and {others} more' if others else ''}: {reason}")

    def _until(
        self, until: float, processes: int, waiting: deque[list[Task]], running: dict[int, _Child]
    ) -> None:
        """Run children until all tasks are finished or the time is over."""
        while waiting or running:
            left = until - self.seconds
            if left <= 0 or self._silent >= MAX_SILENT:
                return
            while waiting and len(running) < processes:
                self._start(waiting.popleft(), left, running)
            wait = min(left, *(child.due - self.seconds for child in running.values()))
            found = self.host.next(max(wait, 0.0))
            if found is None:
                self._end_overdue(running, waiting)
            elif found[0] in running:
                self._take(*found, running, waiting)

    def _start(self, tasks: list[Task], left: float, running: dict[int, _Child]) -> None:
        names = {task.name for task in tasks}
        request = {
            "tasks": [asdict(task) for task in tasks],
            "seconds": left,
            "out": str(self.out),
            "excluded": {name: reasons for name, reasons in self._excluded.items() if name in names},
        }
        number = self.host.start(request)
        running[number] = _Child(deque(tasks), self.seconds + self._patience * START_SECONDS)

    def _end_overdue(self, running: dict[int, _Child], waiting: deque[list[Task]]) -> None:
        for number, child in list(running.items()):
            if child.due <= self.seconds:
                self.host.kill(number)
                del running[number]
                self._lost(child, child.doing, f"{child.doing} took too long", waiting)

    def _take(
        self, number: int, event: Event, running: dict[int, _Child], waiting: deque[list[Task]]
    ) -> None:
        child = running[number]
        task = child.tasks[0] if child.tasks else None
        match event["event"]:
            case "begin":
                assert task is not None
                child.started, child.doing = True, task.name
                child.due = child.ends = self.seconds + task.seconds + GRACE
                self.show(f"-- {self.seconds:.0f} s: {task.name}")
            case "doing":
                child.doing = event["what"]
                child.due = min(self.seconds + self._patience * event["patience"], child.ends)
            case "line":
                self._line(task, event["line"], event["file"])
            case "end":
                self._settled(child)
                self.outcome.done.append(event["task"])
                self.show(f"   {event['task']}: {event['seconds']:.1f} s")
            case "failed":
                self._settled(child)
                self._red(event["task"], event["reason"])
            case "skipped":
                self._settled(child)
                self.outcome.left_out[event["task"]] = event["reason"]
            case "broken":
                del running[number]
                self.host.kill(number)
                self._lost(child, event["culprit"], event["reason"], waiting)
            case "cache":
                self.hits += event["hits"]
                self.compiled.update(event["compiled"])
            case "exit":
                del running[number]
                if child.tasks:
                    reason = f"its process ended with code {event['code']}, at {child.doing}"
                    self._lost(child, child.doing, reason, waiting)

    def _settled(self, child: _Child) -> None:
        """Mark a child's current task as finished."""
        child.tasks.popleft()
        child.started, child.doing = False, "the end of a task"
        child.due = self.seconds + self._patience * PATIENCE

    def _lost(self, child: _Child, culprit: str, reason: str, waiting: deque[list[Task]]) -> None:
        """Record why a child was lost, and continue with its remaining tasks in a new child."""
        if not child.tasks:
            return  # it had finished all tasks, but could not exit
        self._silent = 0 if child.started else self._silent + 1
        task = child.tasks[0]
        rest = list(child.tasks)
        line = {"name": task.name, "culprit": culprit, "reason": reason}
        append(self.out / "crashes.jsonl", self.record | line)
        excluded = self._excluded.setdefault(task.name, {})
        # A case continues without the candidate. Other tasks, or a repeated loss at one candidate, fail.
        if child.started and excludable(task, culprit) and culprit not in excluded:
            excluded[culprit] = reason
            self.show(f"retrying without {culprit}: {task.name} ({reason})")
        else:
            self._red(task.name, reason)
            rest = rest[1:]
        if rest:
            waiting.appendleft(rest)

    def _line(self, task: Task | None, line: dict[str, Any], file: str) -> None:
        if line.get("name") == PROBE:
            self.record |= line.pop("record")
        name = {} if task is None else {"task": task.name}
        append(self.out / file, self.record | line | name)

    def _red(self, name: str, reason: str) -> None:
        self.outcome.red[name] = reason
        append(self.out / "gpu.jsonl", self.record | {"name": name, "ok": False, "reason": reason})
        self.show(f"RED {name}: {reason}")

    def _done_before(self) -> set[str]:
        """Tasks that an earlier run completed for this commit and device, except the probe."""
        return {
            line["task"]
            for file in ("gpu.jsonl", "tuned.jsonl")
            for line in self._mine(self.out / file)
            if "task" in line
            and line["task"] not in (PROBE, *self.outcome.done)
            and line.get("ok", True)
            and all(row["status"] != "skipped" for row in line.get("rows", ()))
        }

    def _mine(self, path: Path) -> Iterator[dict[str, Any]]:
        device = self.record.get("machine", {}).get("device")
        for line in read(path):
            if line.get("commit") == self.commit and line.get("machine", {}).get("device") == device:
                yield line

    def _finish(self) -> None:
        outcome = self.outcome
        summary = {
            "name": "plan",
            "seconds": round(self.seconds, 1),
            "done": outcome.done,
            "red": outcome.red,
            "left_out": outcome.left_out,
            "cache": {"hits": self.hits, "compiled": dict(self.compiled)},
        }
        append(self.out / "gpu.jsonl", self.record | summary)
        compiled = (
            f": {', '.join(f'{n} {name}' for name, n in self.compiled.items())}" if self.compiled else ""
        )
        self.show(f"Triton's cache: {self.hits} hits, {self.compiled.total()} compiled{compiled}")
        self.show(
            f"== {self.seconds:.0f} s: {len(outcome.done)} done, {len(outcome.red)} red, "
            f"{len(outcome.left_out)} left out"
        )
        for name, reason in outcome.red.items():
            self.show(f"RED {name}: {reason}")
