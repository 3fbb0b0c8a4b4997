"""Where a run of puzzle training stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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
    """

    step: int
    seconds: float
    sums: dict[str, float]
    steps: float
    history: list[dict[str, Any]]
    settings: dict[str, Any]
