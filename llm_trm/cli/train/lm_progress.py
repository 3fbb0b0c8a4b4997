"""The progress of ``llm-trm train lm``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llm_trm.cli.train import console
from llm_trm.train.lm.report import LanguageModelPlan


class ConsoleReport(console.ConsoleReport):
    """One line whenever metrics are logged: there is no evaluation before the end."""

    PRINTS_METRICS = True

    def describe(self, plan: LanguageModelPlan) -> Iterator[str]:
        size = f"{plan.parameters:,} parameters"
        yield f"{size}; {plan.steps} steps of {plan.batch_size} samples; {plan.device}"
        if plan.start:
            yield f"resuming at step {plan.start + 1}"

    def numbers(self, values: Mapping[str, Any]) -> str:
        return (
            f"loss {values['loss']:.4f}  rate {values['learning_rate']:.1e}  "
            f"gradient {values.get('grad_norm', 0.0):.3f}  {self.pace:.1f} steps/s"
        )
