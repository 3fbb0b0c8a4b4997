"""How ``llm-trm train phase2`` shows that it is at work."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import TaskID

from llm_trm.cli.bars import training_bar
from llm_trm.train.phase2.report import Phase2Plan, Phase2Report


class ConsoleReport(Phase2Report):
    """A line an epoch on stdout, and on a terminal a bar on stderr, renewed with every batch."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._bar = training_bar()
        self._task: TaskID | None = None
        self._numbers = ""
        self._plan: Phase2Plan
        self._begun = self._epoch_begun = 0.0
        self._batches = self._epoch_batches = 0

    def __enter__(self) -> ConsoleReport:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, plan: Phase2Plan) -> None:
        self._plan = plan
        self._console.print(
            f"{plan.training} samples to train on, {plan.held_out} held out, D' = {plan.width}; "
            f"{plan.parameters:,} parameters; {plan.epochs} epochs of {plan.batches} batches of "
            f"{plan.batch_size}, {plan.updates} updates; {plan.device}"
        )
        if plan.repeated:
            self._console.print(
                f"{plan.repeated} of those held out are of problems that are trained on too: hold out others "
                "with --val-data"
            )
        epoch, batch = plan.start
        if (epoch, batch) != (0, 0):
            self._console.print(f"resuming at epoch {epoch + 1}, batch {batch + 1}")
        done = epoch * plan.batches + batch
        self._task = self._bar.add_task("", total=plan.epochs * plan.batches, completed=done, numbers="")
        self._begun = self._epoch_begun = time.monotonic()
        self._bar.start()

    def batch(self, epoch: int, batch: int, metrics: Mapping[str, float] | None) -> None:
        self._batches += 1
        self._epoch_batches += 1
        if self._task is None or self._bar.disable:
            return
        if metrics is not None:
            speed = self._batches * self._plan.batch_size / (time.monotonic() - self._begun)
            self._numbers = (
                f"loss {metrics['loss']:.5f}  cos {metrics['cosine']:.4f}  "
                f"halt {metrics['halt_probability']:.2f}  {speed:.1f} samples/s"
            )
        self._bar.update(
            self._task,
            completed=(epoch - 1) * self._plan.batches + batch,
            description=f"epoch {epoch}/{self._plan.epochs}",
            numbers=self._numbers,
        )

    def epoch(self, record: Mapping[str, Any]) -> None:
        train, held_out = record["train"], record["validation"]
        speed = self._epoch_batches * self._plan.batch_size / (time.monotonic() - self._epoch_begun)
        skipped = record["skipped"]
        line = (
            f"epoch {record['epoch']:>3}  loss {train['loss']:.5f}  cos {train['cosine']:.4f}  "
            f"halt {train['halt_probability']:.2f}  held out: mse {held_out['mse']:.5f}  "
            f"cos {held_out['cosine']:.4f}  halted after {held_out['halt_steps']:.1f} at cos "
            f"{held_out['halted_cosine']:.4f}  {speed:.1f} samples/s"
        )
        printer = self._console if self._bar.disable else self._bar.console
        printer.print(line + (f"  {skipped} updates skipped" if skipped else ""))
        self._epoch_begun, self._epoch_batches = time.monotonic(), 0
