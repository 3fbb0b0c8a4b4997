"""What phase 2 tells of a run, and to whom."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Phase2Plan:
    """What a run is about to do, for its report.

    Attributes:
        training, held_out: Samples.
        repeated: Held-out samples of a problem that is trained on too.
        width: D'.
        parameters: Trainable numbers of the model.
        batches: Of an epoch.
        updates: Of the whole run.
        epochs: Of the whole run.
        batch_size: Of all processes together.
        start: Epoch and batch to go on from, counted from 0.
        device: In words.
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
    start: tuple[int, int]
    device: str


@dataclass(frozen=True)
class Phase2Result:
    """How a run ended.

    Attributes:
        best: Checkpoint of the lowest validation loss.
        history: A record an epoch: ``epoch`` (from 1), ``updates`` so far, ``skipped`` ones among those of
            the epoch, ``learning_rate`` at its end, ``threshold`` in it, and the means ``train`` and
            ``validation``.
        skipped: Updates that were skipped because their gradient was not finite.
        stopped_early: Whether patience ended it.
    """

    best: Path | None
    history: list[dict[str, Any]]
    skipped: int
    stopped_early: bool


def best_record(history: Sequence[Mapping[str, Any]]) -> int:
    """Place of the record with the lowest validation loss; NaN counts as infinitely high."""
    losses = [record["validation"]["mse"] for record in history]
    return min(range(len(losses)), key=lambda place: math.inf if math.isnan(losses[place]) else losses[place])


class Phase2Report:
    """Hears how a run goes; this one says nothing. Only the main process calls it."""

    def begin(self, plan: Phase2Plan) -> None:
        """Training begins."""

    def batch(self, epoch: int, batch: int, metrics: Mapping[str, float] | None) -> None:
        """Batch ``batch`` of ``epoch``, both from 1, is on its way; ``metrics`` where new ones came."""

    def epoch(self, record: Mapping[str, Any]) -> None:
        """An epoch has been validated; ``record`` as in :class:`Phase2Result`."""
