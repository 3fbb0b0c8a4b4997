"""The progress of a run of puzzle training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from llm_trm.ranges import AMOUNT, PLACE
from llm_trm.train.run.run import Progress


@dataclass(frozen=True, kw_only=True)
class PuzzleProgress(Progress):
    """The progress of a run, as JSON values.

    Attributes:
        step: Number of steps so far.
        seconds: Seconds of training so far.
    """

    NUMBERS = ("step", "seconds")
    TABLES: ClassVar[dict[str, tuple[str, ...]]] = {"train": (), "test": ("exact", "puzzles")}
    OPTIONAL = frozenset({"test"})

    step: Annotated[int, PLACE]
    seconds: Annotated[float, AMOUNT]
