"""A child process of a plan: reads tasks from stdin, runs them in turn, and reports to its supervisor."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bench.gpu.context import EVENTS, BrokenDeviceError, Context, Event
from bench.gpu.plans import Task

#: Runs one task; raises if it fails.
Runner = Callable[[Context], None]


def _runners() -> dict[str, Runner]:
    from bench.gpu import cases, commands, probe, smollm3, trainers, tuning

    return {
        "probe": probe.run,
        "smoke": probe.run_check,
        "case": cases.run,
        "tune": tuning.run,
        "puzzle": trainers.run_puzzle,
        "trainer": trainers.run_trainer,
        "tests": commands.run_tests,
        "command": commands.run_command,
        "phase2": commands.run_phase2,
        "smollm3": smollm3.run,
    }


def run_tasks(
    tasks: Sequence[Task],
    ends: float,
    emit: Callable[[Event], None],
    out: Path,
    excluded: Mapping[str, Mapping[str, str]],
    runners: Mapping[str, Runner],
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Run the tasks in turn, skipping those without enough time left. Returns the exit code.

    Args:
        tasks: The tasks in order.
        ends: Time on ``clock`` at which all tasks must have ended.
        emit: Sends an event to the supervisor.
        out: Folder of the results.
        excluded: For each task, candidates that broke the device before.
        runners: Runners by kind of task.
        clock: Clock in seconds.
    """
    for task in tasks:
        start = clock()
        if ends - start < task.least:
            reason = f"{max(ends - start, 0.0):.0f} s are left, but it needs {task.least:.0f}"
            emit({"event": "skipped", "task": task.name, "reason": reason})
            continue
        emit({"event": "begin", "task": task.name})
        until = min(ends, start + task.seconds)
        try:
            runners[task.kind](Context(task, until, emit, out, excluded.get(task.name, {}), clock))
        except BrokenDeviceError as error:
            emit({"event": "broken", "task": task.name, "culprit": error.culprit, "reason": str(error)})
            return 3
        except Exception as error:  # continue with the other tasks
            traceback.print_exc()
            reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            emit({"event": "failed", "task": task.name, "reason": reason})
        else:
            emit({"event": "end", "task": task.name, "seconds": round(clock() - start, 1)})
    return 0


def main() -> None:
    """Read the request from stdin and run it."""
    start = time.monotonic()
    request = json.load(sys.stdin)
    pipe = os.fdopen(int(os.environ[EVENTS]), "w", buffering=1)

    from bench.gpu.cache import watch

    seen = watch()

    def emit(event: Event) -> None:
        if event["event"] in ("end", "failed", "broken"):
            hits, compiled = seen.take()
            print(json.dumps({"event": "cache", "hits": hits, "compiled": compiled}), file=pipe)
        print(json.dumps(event), file=pipe)

    code = run_tasks(
        [Task(**task) for task in request["tasks"]],
        start + request["seconds"],
        emit,
        Path(request["out"]),
        request["excluded"],
        _runners(),
    )
    sys.stdout.flush()
    # Not sys.exit, because a hanging device would keep the interpreter from exiting.
    os._exit(code)


if __name__ == "__main__":
    main()
