"""What a checkpoint of puzzle training holds beside the model: all that a resumed run needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llm_trm.errors import InputError
from llm_trm.files import read_json, write_json, write_tensors
from llm_trm.train.phase2_state import PROGRESS_FILE, START_OVER, TENSORS_FILE


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


def write_puzzle_state(folder: Path, progress: PuzzleProgress, tensors: Mapping[str, Tensor]) -> None:
    """Write both into ``folder``."""
    write_tensors(folder / TENSORS_FILE, tensors)
    write_json(folder / PROGRESS_FILE, asdict(progress))


def read_puzzle_progress(folder: Path) -> PuzzleProgress:
    """The progress that :func:`write_puzzle_state` wrote; InputError if it is missing or broken."""
    path = folder / PROGRESS_FILE
    try:
        return PuzzleProgress(**read_json(path, START_OVER))
    except TypeError as error:
        raise InputError(f"{path} does not say where the run stood: {START_OVER}") from error
