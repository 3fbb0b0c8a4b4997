"""The state in a checkpoint: everything except the model that a run needs to resume bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from llm_trm.errors import InputError
from llm_trm.files import read_json, read_tensors, write_json, write_tensors
from trm_kernels import ParameterAverage

P = TypeVar("P")

_TENSORS, _PROGRESS = "state.safetensors", "state.json"
_REMEDY = "start over with --overwrite"


def write_state(folder: Path, progress: Any, tensors: Mapping[str, Tensor]) -> None:
    """Write the progress of a run, a dataclass of JSON values, and its tensors to ``folder``."""
    write_tensors(folder / _TENSORS, tensors)
    write_json(folder / _PROGRESS, asdict(progress))


def read_progress(folder: Path, kind: type[P]) -> P:
    """The progress that :func:`write_state` wrote; InputError if it is missing, broken or another kind."""
    path = folder / _PROGRESS
    described = read_json(path, _REMEDY)
    try:
        return kind(**described)
    except ValueError as error:
        raise InputError(f"{path}: {error}: {_REMEDY}") from error
    except TypeError as error:
        raise InputError(f"{path} does not record the progress of the run: {_REMEDY}") from error


def read_state(folder: Path) -> dict[str, Tensor]:
    """The tensors that :func:`write_state` wrote; InputError if the file is missing or broken."""
    return read_tensors(folder / _TENSORS, _REMEDY)


def training_tensors(model: nn.Module, average: ParameterAverage, optimizer: Optimizer) -> dict[str, Tensor]:
    """Weights, their averages, and the optimizer's moments by name, not copied."""
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
    """Restore what :func:`training_tensors` returned; returns all tensors of the checkpoint.

    Raises:
        InputError: A missing or broken file, or one of another model.
    """
    tensors = read_state(folder)
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
        raise InputError(
            f"{folder / _TENSORS} contains a different model from this run's: {_REMEDY}"
        ) from error
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return tensors
