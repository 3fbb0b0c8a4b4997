"""The context of a task, through which it reports to its supervisor."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu.plans import Task

#: Environment variable with the file descriptor of the pipe for events.
EVENTS = "BENCH_GPU_EVENTS"
#: Default number of seconds after which a step counts as hanging.
PATIENCE = 20.0

#: An event of a child: its kind and details.
Event = dict[str, Any]


class BrokenDeviceError(RuntimeError):
    """The device no longer works in this process; ``culprit`` is the cause."""

    def __init__(self, culprit: str, reason: str) -> None:
        super().__init__(reason)
        self.culprit = culprit


@dataclass
class Context:
    """The context of a task.

    Attributes:
        task: The task.
        ends: Time on ``clock`` at which it must have ended.
        emit: Sends an event to the supervisor.
        out: Folder of the results; the supervisor writes the result files.
        excluded: Candidates that broke the device in this task before, with the reason.
        clock: Clock in seconds.
    """

    task: Task
    ends: float
    emit: Callable[[Event], None]
    out: Path
    excluded: Mapping[str, str] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic

    @property
    def argument(self) -> dict[str, Any]:
        """The task's argument in the plan."""
        return self.task.argument

    @property
    def left(self) -> float:
        """Seconds until the task must have ended."""
        return self.ends - self.clock()

    def doing(self, what: str, patience: float = PATIENCE) -> None:
        """Report the next step, which counts as hanging after ``patience`` seconds."""
        self.emit({"event": "doing", "what": what, "patience": patience})

    def line(self, line: Mapping[str, Any], file: str = "gpu.jsonl") -> None:
        """Send a line for a result file."""
        self.emit({"event": "line", "line": dict(line), "file": file})
