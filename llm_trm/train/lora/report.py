"""What ``llm-trm train lora`` reports: its plan, and the result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_trm.train.run.report import Plan


@dataclass(frozen=True, kw_only=True)
class LoraPlan(Plan):
    """What a run is about to do; a step is an update.

    Attributes:
        training, held_out: Number of questions.
        left_out: Number of questions that are longer than allowed.
        shared: Number of questions not trained on because they are held out.
        thinking: Number of questions to train on that have written thinking.
        trainable, parameters: Number of trainable parameters, and of all.
        reasoner: The reasoner, as text.
        form: How questions are put.
        added: Tokens that the tokenizer lacked.
    """

    training: int
    held_out: int
    left_out: int
    shared: int
    thinking: int
    trainable: int
    parameters: int
    reasoner: str
    form: str
    added: list[str]


@dataclass(frozen=True)
class LoraResult:
    """How a run ended.

    Attributes:
        output: Folder of the model with the lowest held-out loss.
        best_step: The update that it is from.
        metrics: Its held-out metrics.
        history: What the Trainer logged: training metrics, and evaluations with names ``eval_...``.
        stopped_early: Whether patience ended the run.
        seconds: Duration of the training in this process.
    """

    output: Path
    best_step: int
    metrics: dict[str, float]
    history: list[dict[str, Any]]
    stopped_early: bool
    seconds: float
