"""The progress of ``llm-trm train lora``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llm_trm.cli.train import console
from llm_trm.train.lora.report import LoraPlan


class ConsoleReport(console.ConsoleReport):
    """One line per evaluation."""

    def describe(self, plan: LoraPlan) -> Iterator[str]:
        added = f"; added to its tokenizer: {' '.join(plan.added)}" if plan.added else ""
        yield (
            f"{plan.training:,} questions to train on ({plan.thinking:,} with written thinking), "
            f"{plan.held_out:,} held out, {plan.form} form{added}"
        )
        yield f"{plan.reasoner}; {plan.trainable:,} of {plan.parameters:,} parameters are trained"
        if plan.left_out:
            yield f"left out because they are longer than allowed: {plan.left_out:,} questions"
        if plan.shared:
            yield f"left out because they are held out: {plan.shared:,} questions to train on"
        if plan.start:
            yield f"resuming at update {plan.start}"

    def numbers(self, values: Mapping[str, Any]) -> str:
        return (
            f"loss {values['loss']:.4f}  rate {values['learning_rate']:.1e}  "
            f"{1 / max(self.pace, 1e-9):.2f} s per update"
        )

    def evaluation(self, record: Mapping[str, Any]) -> str:
        return f"update {self._place(record['step'])}  {held_out(record, 'eval_')}  {self.seconds:.0f} s"


def held_out(metrics: Mapping[str, float], prefix: str = "") -> str:
    """The metrics of an evaluation as text; their names start with ``prefix``."""
    words = [f"held out: loss {metrics[f'{prefix}loss']:.4f}"]
    for name, label, form in (
        ("answer_accuracy", "answers right", ".1%"),
        ("think_rate", "writes <think>", ".1%"),
        ("needless_think_rate", "needlessly", ".1%"),
        ("trm_steps", "steps", ".2f"),
        ("reconstruction_error", "lost by compression", ".2%"),
    ):
        if f"{prefix}{name}" in metrics:
            words.append(f"{label} {metrics[f'{prefix}{name}']:{form}}")
    return "  ".join(words)
