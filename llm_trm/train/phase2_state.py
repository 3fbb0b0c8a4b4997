"""Where a run of phase 2 stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Progress:
    """Where a run stands, as JSON values.

    Attributes:
        epoch, batch: The epoch and the batch in it to go on with, counted from 0.
        updates: Updates so far.
        skipped: Updates so far that were skipped because a gradient was not finite.
        threshold: Of the halting loss.
        sums: Sums of the training metrics of the epoch so far, over ``steps`` updates.
        steps: Updates that ``sums`` covers.
        history: Records of the finished epochs.
        settings: What a resumed run must share.
    """

    epoch: int
    batch: int
    updates: int
    skipped: float
    threshold: float
    sums: dict[str, float]
    steps: float
    history: list[dict[str, Any]]
    settings: dict[str, Any]
