"""The progress of a run of phase 2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from llm_trm.ranges import AMOUNT, COSINE, PLACE
from llm_trm.train.run import run


@dataclass(frozen=True, kw_only=True)
class Progress(run.Progress):
    """The progress of a run, as JSON values.

    Attributes:
        epoch, batch: The epoch to continue with and the batch in it, counted from 0.
        updates: Number of updates so far.
        skipped: Number of updates so far that were skipped since a gradient was not finite.
        threshold: Threshold of the halting loss.
    """

    NUMBERS = ("epoch", "updates", "skipped", "learning_rate", "threshold")
    TABLES: ClassVar[dict[str, tuple[str, ...]]] = {"train": (), "validation": ("mse",)}

    epoch: Annotated[int, PLACE]
    batch: Annotated[int, PLACE]
    updates: Annotated[int, PLACE]
    skipped: Annotated[float, AMOUNT]
    threshold: Annotated[float, COSINE]
