"""A stage of phase 1 that was interrupted: all that it needs to continue, bit for bit on a CPU."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from llm_trm.errors import InputError
from llm_trm.files import writable_folder
from llm_trm.ranges import FINITE, PLACE, require_ranges
from llm_trm.train.run.training_state import read_progress, read_state, write_state


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
        best: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Write progress, the current and the best weights, and the state of the optimizer."""
        tensors = {f"weights.{name}": value for name, value in module.state_dict().items()}
        tensors |= {f"best.{name}": value for name, value in best.items()}
        for number, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
        write_state(writable_folder(self.folder), progress, tensors)

    def read(
        self, module: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[FitProgress, dict[str, Tensor]] | None:
        """Restore module and optimizer.

        Returns:
            The progress and the best weights; None if nothing was interrupted that has these settings.

        Raises:
            InputError: Files that are broken, or of another compressor.
        """
        if not self.folder.exists():
            return None
        progress = read_progress(self.folder, FitProgress)
        if progress.settings != self.settings:
            return None
        tensors = read_state(self.folder)
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, number, name = key.split(".", 2)
                state.setdefault(int(number), {})[name] = value
        try:
            module.load_state_dict(_under("weights.", tensors))
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        except (KeyError, ValueError, RuntimeError) as error:
            raise InputError(f"{self.folder} belongs to a different compressor: delete the folder") from error
        return progress, _under("best.", tensors)

    def remove(self) -> None:
        """Remove the state, once the stage is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
