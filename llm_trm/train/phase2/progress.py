"""Where a run of phase 2 stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from llm_trm.ranges import AMOUNT, COSINE, FINITE, PLACE, require_ranges


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

    Raises:
        ValueError: A number that is not finite, out of range or of the wrong type.
    """

    epoch: Annotated[int, PLACE]
    batch: Annotated[int, PLACE]
    updates: Annotated[int, PLACE]
    skipped: Annotated[float, AMOUNT]
    threshold: Annotated[float, COSINE]
    sums: dict[str, Annotated[float, FINITE]]
    steps: Annotated[float, AMOUNT]
    history: list[dict[str, Any]]
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        require_ranges(self)
