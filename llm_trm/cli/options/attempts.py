"""Options of commands that solve puzzles: ``--tries``, ``--noise`` and ``--max-steps``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llm_trm.errors import InputError
from llm_trm.ranges import DEPTH, SPREAD
from llm_trm.settings import Settings, setting

#: The standard deviation of the initial latent state.
_NOISE = 1.0


@dataclass(frozen=True)
class Attempts(Settings):
    """How often a model tries a puzzle.

    Raises:
        InputError: Noise with a single try, or a value out of range.
    """

    tries: int = setting(
        1,
        "Number of tries per puzzle, all but the first from a noisy latent state; the answer with the "
        "highest halting confidence counts. This needs no retraining. arXiv 2605.19943, which adds noise at "
        "every step, reports 98.75% instead of 87.4% on Sudoku-Extreme.",
        DEPTH,
    )
    noise: float | None = setting(
        None,
        "Standard deviation of the noise; that of the state is 1. Used only with --tries.",
        SPREAD,
        unset=f"{_NOISE:g}",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise is not None and self.tries == 1:
            raise InputError("--noise needs --tries, because the first try has no noise: add --tries 8")

    @property
    def deviation(self) -> float:
        """Standard deviation of the noise; 0 for a single try."""
        return 0.0 if self.tries == 1 else (self.noise or _NOISE)


def max_steps() -> Any:
    """``--max-steps``."""
    return setting(
        None,
        "Maximum number of supervision steps; may exceed that of training.",
        DEPTH,
        was=("--inference-steps",),
        unset="that of training",
    )
