"""What a task is given, and how it tells its supervisor how it goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu.plans import Task

#: Names the file descriptor of the pipe that events are written to.
EVENTS = "BENCH_GPU_EVENTS"
#: A step that takes longer than this hangs, unless it says that it needs more.
PATIENCE = 20.0

#: One event of a child: what it is, and its details.
Event = dict[str, Any]


class BrokenDeviceError(RuntimeError):
    """Nothing works on the device any more in this process, and ``culprit`` is to blame."""

    def __init__(self, culprit: str, reason: str) -> None:
        super().__init__(reason)
        self.culprit = culprit


@dataclass
class Context:
    """What a task is given.

    Attributes:
        task: The task itself.
        ends: When it must have ended, on ``clock``.
        emit: Sends an event to the supervisor.
        out: Folder of the results; the supervisor writes the result files.
        excluded: Candidates that broke the device in this task before, with the reason.
        clock: Seconds.
    """

    task: Task
    ends: float
    emit: Callable[[Event], None]
    out: Path
    excluded: Mapping[str, str] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic

    @property
    def argument(self) -> dict[str, Any]:
        """What the plan gave the task."""
        return self.task.argument

    @property
    def left(self) -> float:
        """Seconds until it must have ended."""
        return self.ends - self.clock()

    def doing(self, what: str, patience: float = PATIENCE) -> None:
        """Say what is done next: if it takes longer than ``patience`` seconds, it is taken to hang."""
        self.emit({"event": "doing", "what": what, "patience": patience})

    def line(self, line: Mapping[str, Any], file: str = "gpu.jsonl") -> None:
        """A line for a result file."""
        self.emit({"event": "line", "line": dict(line), "file": file})
