"""A stage of phase 1 that was interrupted: all that it needs to continue, bit for bit on a CPU."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from llm_trm.files import writable_folder
from llm_trm.ranges import FINITE, PLACE, require_ranges
from llm_trm.train.run.training_state import (
    read_progress,
    restore_training,
    training_tensors,
    write_state,
)


@dataclass(frozen=True)
class FitProgress:
    """The progress of the optimisation of a compressor, as JSON values.

    Attributes:
        steps: Optimizer steps so far.
        best_epoch: Epochs that the best weights took.
        stale: Epochs without a better validation error.
        best, now: Quality of the best weights, and after the last epoch, on held-out states.
        settings: What a stage that continues must share.
    """

    steps: Annotated[int, PLACE]
    best_epoch: Annotated[int, PLACE]
    stale: Annotated[int, PLACE]
    best: dict[str, Annotated[float, FINITE]]
    now: dict[str, Annotated[float, FINITE]]
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        require_ranges(self)


class Unfinished:
    """The state of an interrupted stage, in a folder ``unfinished`` of its own.

    Args:
        folder: Folder of the stage.
        settings: What a stage that continues must share.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder, self.settings = folder / "unfinished", dict(settings)

    def write(
        self,
        progress: FitProgress,
        module: nn.Module,
        best: Iterable[Tensor],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Write progress, the current and the best weights, and the state of the optimizer."""
        write_state(writable_folder(self.folder), progress, training_tensors(module, optimizer, best=best))

    def read(
        self, module: nn.Module, best: Iterable[Tensor], optimizer: torch.optim.Optimizer
    ) -> FitProgress | None:
        """Restore the arguments; returns the progress, None if nothing with these settings was interrupted.

        Raises:
            InputError: Files that are broken, or of another compressor.
        """
        if not self.folder.exists():
            return None
        progress = read_progress(self.folder, FitProgress)
        if progress.settings != self.settings:
            return None
        restore_training(self.folder, module, optimizer, best=best)
        return progress

    def remove(self) -> None:
        """Remove the state: the stage is finished, or starts over."""
        shutil.rmtree(self.folder, ignore_errors=True)
