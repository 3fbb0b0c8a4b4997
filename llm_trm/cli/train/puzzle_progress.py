"""How ``llm-trm train puzzle`` shows that it is at work."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import TaskID

from llm_trm.cli.bars import training_bar
from llm_trm.train.puzzle.report import PuzzlePlan, PuzzleReport


class ConsoleReport(PuzzleReport):
    """A line an evaluation on stdout, and on a terminal a bar on stderr, renewed with every step."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._bar = training_bar()
        self._task: TaskID | None = None
        self._numbers = ""
        self._plan: PuzzlePlan
        self._begun, self._first = 0.0, 0

    def __enter__(self) -> ConsoleReport:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, plan: PuzzlePlan) -> None:
        self._plan = plan
        rows, columns = plan.grid
        self._console.print(
            f"{plan.training} {plan.task} puzzles of {rows} x {columns} to train on, {plan.evaluated} to "
            f"evaluate on; {plan.parameters:,} parameters, {plan.steps} steps of {plan.batch_size} samples "
            f"on {plan.device}."
        )
        if plan.repeated:
            self._console.print(
                f"{plan.repeated} test puzzles are trained on too: what is measured is not only of others."
            )
        if plan.start:
            self._console.print(f"Going on behind step {plan.start}.")
        self._begun, self._first = time.monotonic(), plan.start
        self._task = self._bar.add_task("step", total=plan.steps, completed=plan.start, numbers="")
        self._bar.start()

    def step(self, step: int, metrics: Mapping[str, float] | None) -> None:
        if metrics is not None:
            speed = (step - self._first) * self._plan.batch_size / (time.monotonic() - self._begun)
            self._numbers = (
                f"loss {metrics['loss']:.3f}  in flight: exact {metrics['exact']:.2f}  "
                f"steps to halt {steps_to_halt(metrics)}  {speed:.0f} samples/s"
            )
        assert self._task is not None
        self._bar.update(self._task, completed=step, numbers=self._numbers)

    def evaluated(self, record: Mapping[str, Any]) -> None:
        train, test = record["train"], record["test"]
        line = (
            f"step {record['step']:>6}  {record['seconds']:>6.0f} s  loss {train['loss']:.4f}  in flight: "
            f"exact {train['exact']:.3f}  steps to halt {steps_to_halt(train)}  "
            f"{train['samples_per_second']:.0f} samples/s"
        )
        if test is not None:
            line += f"  test: exact {test['exact']:.4f}  cells {test['cells']:.4f}"
        printer = self._console if self._bar.disable else self._bar.console
        printer.print(line)


def steps_to_halt(metrics: Mapping[str, float]) -> str:
    """Mean steps that a sample takes: as many as there are samples in flight for each one that halts."""
    return f"{1 / metrics['halted']:.1f}" if metrics["halted"] else "-"
