"""What a checkpoint of a run holds beside the model: all that a resumed run needs to go on bit for bit."""

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
    """Write where a run stands, a dataclass of JSON values, and its tensors into ``folder``."""
    write_tensors(folder / _TENSORS, tensors)
    write_json(folder / _PROGRESS, asdict(progress))


def read_progress(folder: Path, kind: type[P]) -> P:
    """The progress that :func:`write_state` wrote; InputError if it is missing, broken or of another kind."""
    path = folder / _PROGRESS
    described = read_json(path, _REMEDY)
    try:
        return kind(**described)
    except ValueError as error:
        raise InputError(f"{path}: {error}: {_REMEDY}") from error
    except TypeError as error:
        raise InputError(f"{path} does not say where the run stood: {_REMEDY}") from error


def require_same_settings(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise InputError unless the settings that a run in ``folder`` had ``before`` are those of ``now``."""
    changed = [
        f"{name} was {before.get(name)} and is {value}"
        for name, value in now.items()
        if before.get(name) != value
    ]
    if changed:
        raise InputError(
            f"{folder} cannot be resumed with other settings ({'; '.join(changed)}): give those of the run, "
            f"or {_REMEDY}"
        )


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
    path = folder / _TENSORS
    tensors = read_tensors(path, _REMEDY)
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
        raise InputError(f"{path} holds another model than this run's: {_REMEDY}") from error
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return tensors
