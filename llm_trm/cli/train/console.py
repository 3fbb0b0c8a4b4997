"""The progress of trainings in a terminal."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

import click
from rich.console import Console

from llm_trm.cli.bars import training_bar
from llm_trm.train.run.figure import CURVES_FILE
from llm_trm.train.run.report import Plan, Report


class ConsoleReport(Report):
    """A line per evaluation on stdout, and a bar on stderr if that is a terminal.

    Subclasses phrase the plan, the metrics next to the bar, and the evaluations.

    Attributes:
        PRINTS_METRICS: Whether logged metrics get a line of their own too.
    """

    PRINTS_METRICS: ClassVar[bool] = False

    def __init__(self) -> None:
        self._bar = training_bar()
        self._console = self._bar.console
        if self._bar.disable:
            self._console = Console(highlight=False, soft_wrap=True)
        self._numbers, self._step = "", 0
        self._started = self._since = time.monotonic()
        self._first = 0

    def __enter__(self) -> ConsoleReport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._bar.stop()

    def describe(self, plan: Any) -> Iterable[str]:
        """The plan as lines of text."""
        raise NotImplementedError

    def numbers(self, values: Mapping[str, Any]) -> str:
        """Metrics of training as text, shown next to the bar."""
        raise NotImplementedError

    def evaluation(self, record: Mapping[str, Any]) -> str:
        """The record of an evaluation as a line."""
        raise NotImplementedError

    @property
    def seconds(self) -> float:
        """Seconds since the training started."""
        return time.monotonic() - self._started

    @property
    def pace(self) -> float:
        """Steps per second since the last evaluation."""
        return (self._step - self._first) / max(time.monotonic() - self._since, 1e-9)

    def say(self, line: str) -> None:
        """Print a line."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def begin(self, plan: Plan) -> None:
        for line in self.describe(plan):
            self.say(line)
        self._step = self._first = plan.start
        self._place = f"{{:>{len(str(plan.steps))}}}/{plan.steps}".format
        self._task = self._bar.add_task("", total=plan.steps, completed=plan.start, numbers="")
        self._started = self._since = time.monotonic()
        self._bar.start()

    def step(self, step: int) -> None:
        self._step = step
        if not self._bar.disable:
            self._bar.update(self._task, completed=step, numbers=self._numbers)

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        if self.PRINTS_METRICS:
            self.say(f"step {self._place(step)}  {self.numbers(values)}")
        elif not self._bar.disable:
            self._numbers = self.numbers(values)

    def evaluated(self, record: Mapping[str, Any]) -> None:
        self.say(self.evaluation(record))
        self._since, self._first = time.monotonic(), self._step


def show_curves(
    plot: Callable[[Any, Path], None], history: Sequence[Mapping[str, Any]], folder: Path
) -> None:
    """Plot the history of a run to ``curves.png`` in its folder, if matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") and history:
        path = folder / CURVES_FILE
        plot(history, path)
        click.echo(f"The curves are in {path}.")
