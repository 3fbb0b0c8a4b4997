"""The progress of ``llm-trm train phase3``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llm_trm.cli.train import console
from llm_trm.train.phase3.report import Phase3Plan


class ConsoleReport(console.ConsoleReport):
    """One line per evaluation, and one whenever metrics are logged."""

    PRINTS_METRICS = True

    def describe(self, plan: Phase3Plan) -> Iterator[str]:
        yield (
            f"{plan.training} problems to train on, {plan.held_out} held out; {plan.trained:,} parameters "
            f"trained, {plan.frozen:,} frozen; {plan.steps} steps of {plan.prompts} problems x "
            f"{plan.group_size} completions; {plan.device}"
        )
        if plan.dropped:
            yield f"{plan.dropped} problems left out: no answer that can be graded"
        if plan.start:
            yield f"resuming at step {plan.start + 1}"

    def numbers(self, values: Mapping[str, Any]) -> str:
        divergence = f"  kl {values['kl']:.4f}" if "kl" in values else ""
        return (
            f"reward {values['reward']:.3f}  right {values['rewards/correctness/mean']:.1%}  "
            f"in the format {values['rewards/format/mean']:.1%}{divergence}  "
            f"gradient {values.get('grad_norm', 0.0):.3f}  {values['completions/mean_length']:.1f} tokens  "
            f"{1000 * values['step_time']:.0f} ms"
        )

    def evaluation(self, record: Mapping[str, Any]) -> str:
        return (
            f"step {self._place(record['step'])}  held out: {record['eval_accuracy']:.1%} right, "
            f"{record['eval_format']:.1%} in the format, {record['eval_tokens']:.1f} tokens"
        )
