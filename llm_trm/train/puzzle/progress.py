"""Where a run of puzzle training stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from llm_trm.ranges import AMOUNT, FINITE, PLACE, require_ranges


@dataclass(frozen=True)
class PuzzleProgress:
    """Where a run stands, as JSON values.

    Attributes:
        step: Steps so far.
        seconds: Of training so far.
        sums: Sums of the training metrics since the last evaluation, over ``steps`` steps.
        steps: Steps that ``sums`` covers.
        history: Records of the evaluations.
        settings: What a resumed run must share.

    Raises:
        ValueError: A number that is not finite, out of range or of the wrong type.
    """

    step: Annotated[int, PLACE]
    seconds: Annotated[float, AMOUNT]
    sums: dict[str, Annotated[float, FINITE]]
    steps: Annotated[float, AMOUNT]
    history: list[dict[str, Any]]
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        require_ranges(self)
