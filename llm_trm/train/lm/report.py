"""What ``llm-trm train lm`` reports: its plan."""

from __future__ import annotations

from dataclasses import dataclass

from llm_trm.train.run.report import Plan


@dataclass(frozen=True, kw_only=True)
class LanguageModelPlan(Plan):
    """What a run is about to do; a step is an update.

    Attributes:
        parameters: Number of parameters.
        batch_size: Samples per step, of all processes.
        device: Devices, as text.
    """

    parameters: int
    batch_size: int
    device: str
