"""What a checkpoint of phase 2 holds beside the model: all that a resumed run needs to go on bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from llm_trm.errors import InputError
from llm_trm.files import read_json, read_tensors, write_json, write_tensors
from trm_kernels import ParameterAverage

#: In the folder of a checkpoint.
TENSORS_FILE, PROGRESS_FILE = "state.safetensors", "state.json"
START_OVER = "start over with --overwrite"


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
    """

    epoch: int
    batch: int
    updates: int
    skipped: float
    threshold: float
    sums: dict[str, float]
    steps: float
    history: list[dict[str, Any]]
    settings: dict[str, Any]


def write_state(folder: Path, progress: Progress, tensors: Mapping[str, Tensor]) -> None:
    """Write both into ``folder``."""
    write_tensors(folder / TENSORS_FILE, tensors)
    write_json(folder / PROGRESS_FILE, asdict(progress))


def read_progress(folder: Path) -> Progress:
    """The progress that :func:`write_state` wrote; InputError if it is missing or broken."""
    path = folder / PROGRESS_FILE
    try:
        return Progress(**read_json(path, START_OVER))
    except TypeError as error:
        raise InputError(f"{path} does not say where the run stood: {START_OVER}") from error


def training_tensors(model: nn.Module, average: ParameterAverage, optimizer: Optimizer) -> dict[str, Tensor]:
    """Weights, their averages, and the optimizer's moments, by name; not copies."""
    tensors = {}
    for (name, parameter), mean in zip(model.named_parameters(), average.averages, strict=True):
        tensors[f"weights.{name}"] = parameter.detach()
        tensors[f"average.{name}"] = mean
        for moment, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{moment}.{name}"] = value
    return tensors


def restore_training(
    folder: Path, model: nn.Module, average: ParameterAverage, optimizer: Optimizer
) -> dict[str, Tensor]:
    """Take over what :func:`training_tensors` gave; returns all tensors of the checkpoint.

    Raises:
        InputError: A missing or broken file, or one of another model.
    """
    path = folder / TENSORS_FILE
    tensors = read_tensors(path, START_OVER)
    parameters = dict(model.named_parameters())
    state: dict[int, dict[str, Tensor]] = {}
    positions = {id(p): n for n, p in enumerate(p for g in optimizer.param_groups for p in g["params"])}
    try:
        with torch.no_grad():
            for (name, parameter), mean in zip(parameters.items(), average.averages, strict=True):
                parameter.copy_(tensors[f"weights.{name}"])
                mean.copy_(tensors[f"average.{name}"])
        for key, tensor in tensors.items():
            if key.startswith("optimizer."):
                _, moment, name = key.split(".", 2)
                state.setdefault(positions[id(parameters[name])], {})[moment] = tensor
    except (KeyError, RuntimeError) as error:
        raise InputError(f"{path} holds another model than this run's: {START_OVER}") from error
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return tensors
