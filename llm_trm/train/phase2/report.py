"""What phase 2 reports: its plan, and the result."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_trm.train.run.report import Plan


@dataclass(frozen=True, kw_only=True)
class Phase2Plan(Plan):
    """What a run is about to do; a step is a batch.

    Attributes:
        training, held_out: Number of samples.
        repeated: Number of held-out samples of a problem that is trained on too.
        width: D'.
        parameters: Number of trainable parameters.
        batches: Batches per epoch.
        updates: Updates of the whole run.
        epochs: Epochs of the whole run.
        batch_size: Batch size of all processes together.
        device: Device, precision and processes, as text.
    """

    training: int
    held_out: int
    repeated: int
    width: int
    parameters: int
    batches: int
    updates: int
    epochs: int
    batch_size: int
    device: str


@dataclass(frozen=True)
class Phase2Result:
    """How a run ended.

    Attributes:
        best: Checkpoint with the lowest validation loss.
        history: One record per epoch: ``epoch`` (from 1), ``updates`` so far, ``skipped`` updates in the
            epoch, ``learning_rate`` at its end, ``threshold`` in it, and the means ``train`` and
            ``validation``.
        skipped: Number of updates that were skipped because their gradient was not finite.
        stopped_early: Whether patience ended it.
    """

    best: Path | None
    history: list[dict[str, Any]]
    skipped: int
    stopped_early: bool


def best_record(history: Sequence[Mapping[str, Any]]) -> int:
    """Index of the record with the lowest validation loss; NaN counts as infinitely high."""
    losses = [record["validation"]["mse"] for record in history]
    return min(range(len(losses)), key=lambda at: math.inf if math.isnan(losses[at]) else losses[at])
