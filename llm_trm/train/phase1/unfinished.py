"""A stage of phase 1 that was interrupted: all that it needs to continue, bit for bit on a CPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from llm_trm.files import publish, unfinished, writable_folder
from llm_trm.manifest import MANIFEST_FILE, require_whole, write_manifest
from llm_trm.publishing import uninterrupted
from llm_trm.ranges import FINITE, PLACE, require_ranges
from llm_trm.train.phase1.reconstruction import Quality
from llm_trm.train.run.settings import START_OVER
from llm_trm.train.run.training_state import (
    PROGRESS_FILE,
    TENSORS_FILE,
    read_progress,
    restore_training,
    training_tensors,
    write_state,
)

#: In the order of their writing.
_FILES = (TENSORS_FILE, PROGRESS_FILE, MANIFEST_FILE)


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
        for name in ("best", "now"):
            if getattr(self, name).keys() != {field.name for field in fields(Quality)}:
                raise ValueError(f"{name} does not describe the quality of a compressor")


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
        writable_folder(self.folder.parent)
        with unfinished(self.folder.parent, self.folder.name) as temporary:
            write_state(temporary, progress, training_tensors(module, optimizer, best=best))
            write_manifest(temporary)
            with uninterrupted():
                self.remove()
                writable_folder(self.folder)
                for name in _FILES:
                    publish(temporary / name, self.folder / name)

    def read(
        self, module: nn.Module, best: Iterable[Tensor], optimizer: torch.optim.Optimizer
    ) -> FitProgress | None:
        """Restore the arguments; returns the progress, None if nothing with these settings was interrupted.

        Raises:
            InputError: Files that are broken, or of another compressor.
        """
        if not any((self.folder / name).exists() for name in _FILES[1:]):  # tensors alone: killed in writing
            return None
        require_whole(self.folder, START_OVER)
        progress = read_progress(self.folder, FitProgress)
        if progress.settings != self.settings:
            return None
        restore_training(self.folder, module, optimizer, best=best)
        return progress

    def remove(self) -> None:
        """Remove the state: the stage is finished, or starts over. Files of the user stay."""
        for name in _FILES:
            (self.folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # missing, not empty, or a link
            self.folder.rmdir()
