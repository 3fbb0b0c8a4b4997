"""The progress of ``llm-trm train puzzle``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llm_trm.cli.train import console
from llm_trm.train.puzzle.report import PuzzlePlan


class ConsoleReport(console.ConsoleReport):
    """One line per evaluation."""

    def describe(self, plan: PuzzlePlan) -> Iterator[str]:
        self._plan = plan
        rows, columns = plan.grid
        yield (
            f"{plan.training} {plan.task} puzzles of {rows} x {columns} to train on, {plan.evaluated} to "
            f"evaluate on; {plan.parameters:,} parameters, {plan.steps} steps of {plan.batch_size} samples "
            f"on {plan.device}."
        )
        if plan.repeated:
            yield f"{plan.repeated} test puzzles are also trained on: the test is not only of unseen puzzles."
        if plan.start:
            yield f"Resuming after step {plan.start}."

    def numbers(self, values: Mapping[str, Any]) -> str:
        return (
            f"loss {values['loss']:.3f}  in flight: exact {values['exact']:.2f}  "
            f"steps to halt {steps_to_halt(values)}  {self.pace * self._plan.batch_size:.0f} samples/s"
        )

    def evaluation(self, record: Mapping[str, Any]) -> str:
        train, test = record["train"], record["test"]
        line = (
            f"step {record['step']:>6}  {record['seconds']:>6.0f} s  loss {train['loss']:.4f}  in flight: "
            f"exact {train['exact']:.3f}  steps to halt {steps_to_halt(train)}  "
            f"{train['samples_per_second']:.0f} samples/s"
        )
        return line if test is None else f"{line}  test: exact {test['exact']:.4f}  cells {test['cells']:.4f}"


def steps_to_halt(metrics: Mapping[str, float]) -> str:
    """Mean number of steps per sample: the number of samples in flight for each one that halts."""
    return f"{1 / metrics['halted']:.1f}" if metrics["halted"] else "-"
