"""The progress of ``llm-trm train phase2``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llm_trm.cli.train import console
from llm_trm.train.phase2.report import Phase2Plan


class ConsoleReport(console.ConsoleReport):
    """One line per epoch."""

    def describe(self, plan: Phase2Plan) -> Iterator[str]:
        self._plan = plan
        yield (
            f"{plan.training} samples to train on, {plan.held_out} held out, D' = {plan.width}; "
            f"{plan.parameters:,} parameters; {plan.epochs} epochs of {plan.batches} batches of "
            f"{plan.batch_size}, {plan.updates} updates; {plan.device}"
        )
        if plan.repeated:
            yield (
                f"{plan.repeated} held-out samples are of problems that are also trained on: hold out others "
                "with --val-data"
            )
        if plan.start:
            epoch, batch = divmod(plan.start, plan.batches)
            yield f"resuming at epoch {epoch + 1}, batch {batch + 1}"

    def numbers(self, values: Mapping[str, Any]) -> str:
        return (
            f"loss {values['loss']:.5f}  cos {values['cosine']:.4f}  halt {values['halt_probability']:.2f}  "
            f"{self.pace * self._plan.batch_size:.1f} samples/s"
        )

    def evaluation(self, record: Mapping[str, Any]) -> str:
        train, held_out, skipped = record["train"], record["validation"], record["skipped"]
        line = (
            f"epoch {record['epoch']:>3}  loss {train['loss']:.5f}  cos {train['cosine']:.4f}  "
            f"halt {train['halt_probability']:.2f}  held out: mse {held_out['mse']:.5f}  "
            f"cos {held_out['cosine']:.4f}  halted after {held_out['halt_steps']:.1f} at cos "
            f"{held_out['halted_cosine']:.4f}  {self.pace * self._plan.batch_size:.1f} samples/s"
        )
        return line + (f"  {skipped} updates skipped" if skipped else "")
