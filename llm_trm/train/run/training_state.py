"""The state in a checkpoint: everything except the model that a run needs to resume bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from llm_trm.errors import InputError
from llm_trm.files import read_json, write_json
from llm_trm.train.run.settings import START_OVER
from llm_trm.weights import read_shapes, read_tensors, write_tensors

P = TypeVar("P")

TENSORS_FILE, PROGRESS_FILE = "state.safetensors", "state.json"


def write_state(folder: Path, progress: Any, tensors: Mapping[str, Tensor]) -> None:
    """Write the progress of a run, a dataclass of JSON values, and its tensors to ``folder``."""
    write_tensors(folder / TENSORS_FILE, tensors)
    write_json(folder / PROGRESS_FILE, asdict(progress))


def read_progress(folder: Path, kind: type[P]) -> P:
    """The progress that :func:`write_state` wrote; InputError if it is missing, broken or another kind."""
    path = folder / PROGRESS_FILE
    described = read_json(path, START_OVER)
    try:
        return kind(**described)
    except ValueError as error:
        raise InputError(f"{path}: {error}: {START_OVER}") from error
    except TypeError as error:
        raise InputError(f"{path} does not record the progress of the run: {START_OVER}") from error


def require_state(folder: Path, remedy: str) -> None:
    """Raise InputError, ending in ``remedy``, unless the files of :func:`write_state` can be opened."""
    read_json(folder / PROGRESS_FILE, remedy)
    read_shapes(folder / TENSORS_FILE, remedy)


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names start with ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def training_tensors(model: nn.Module, optimizer: Optimizer, **copies: Iterable[Tensor]) -> dict[str, Tensor]:
    """Weights, copies of them such as averages, and the optimizer's moments by name, all as they are.

    Args:
        copies: By kind, one tensor per parameter in the order of ``model.parameters()``.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"weights.{name}"] = parameter.detach()
        for moment, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{moment}.{name}"] = value
    for kind, values in copies.items():
        for (name, _), value in zip(model.named_parameters(), values, strict=True):
            tensors[f"{kind}.{name}"] = value
    return tensors


@torch.no_grad()
def restore_training(
    folder: Path, model: nn.Module, optimizer: Optimizer, **copies: Iterable[Tensor]
) -> dict[str, Tensor]:
    """Copy what :func:`training_tensors` returned into its arguments; returns all tensors of the checkpoint.

    Raises:
        InputError: A missing or broken file, or one of another model.
    """
    tensors = read_tensors(folder / TENSORS_FILE, START_OVER)
    parameters = dict(model.named_parameters())
    state: dict[int, dict[str, Tensor]] = {}
    positions = {id(p): n for n, p in enumerate(p for g in optimizer.param_groups for p in g["params"])}
    try:
        for kind, values in {"weights": parameters.values(), **copies}.items():
            for name, value in zip(parameters, values, strict=True):
                value.copy_(tensors[f"{kind}.{name}"])
        for key, tensor in under("optimizer.", tensors).items():
            moment, name = key.split(".", 1)
            if tensor.ndim and tensor.shape != parameters[name].shape:
                raise ValueError(f"{key} has another shape than the parameter")
            state.setdefault(positions[id(parameters[name])], {})[moment] = tensor
    except (KeyError, RuntimeError, ValueError) as error:
        raise InputError(
            f"{folder / TENSORS_FILE} contains a different model from this run's: {START_OVER}"
        ) from error
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return tensors
