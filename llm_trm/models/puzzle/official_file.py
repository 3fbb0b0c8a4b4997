"""Reads the weights of an official checkpoint and the prefix of their names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llm_trm.errors import InputError, few
from llm_trm.weights import read_torch, require_finite

TOKENS, LAYERS = "embed_tokens.embedding_weight", "L_level.layers."

#: The remedy in every error that another file would solve.
REMEDY = "name a step_N file of the official code"

_ALWAYS = ("H_init", "L_init", TOKENS, "lm_head.weight", "q_head.weight", "q_head.bias")
_WIDENED = (torch.float32, torch.bfloat16, torch.float16)  # float32 represents all their values
#: An entry or a prefix that names an exponential moving average.
_AVERAGE = re.compile(r"(?:^|[._])ema(?:$|[._])", re.IGNORECASE)
#: Levels of mappings around a state dict; known files have up to two.
_DEEPEST = 4


class OfficialWeights(NamedTuple):
    """The weights of a checkpoint.

    Attributes:
        prefix: The common prefix of the tensors' names.
        tensors: Tensors by name, without the prefix.
        averaged: Whether they are an exponential moving average, which was next to the trained weights.
    """

    prefix: str
    tensors: dict[str, Tensor]
    averaged: bool


def read_checkpoint(path: Path) -> OfficialWeights:
    """Read a state dict, or a mapping that has one, such as ``{"model": ..., "ema": ..., "step": ...}``.

    If there is an exponential moving average next to the model, its weights are taken, as in the official
    evaluation; the model adds the buffers, which are not averaged.

    Raises:
        InputError: The file is not a checkpoint, or belongs to another model.
    """
    found = [one for place, tensors in _state_dicts(path) for one in _models(path, place, tensors)]
    trained = [one for one in found if not one.averaged]
    averages = [one for one in found if one.averaged]
    if not found:
        raise InputError(f"{path} is not a TRM checkpoint (it has no {TOKENS}): {REMEDY}")
    if len(trained) > 1 or len(averages) > 1:
        raise InputError(f"{path} has the weights of {len(found)} models: save one of them in a file")
    first, *others = trained + averages
    prefix, tensors = first.prefix, first.tensors
    for average in others:
        tensors = {**tensors, **average.tensors}

    missing = [name for name in _ALWAYS if name not in tensors]
    if not any(name.startswith(f"{LAYERS}0.") for name in tensors):
        missing.append(f"{LAYERS}0")
    require_tensors(path, missing)
    for name, tensor in tensors.items():
        if tensor.dtype not in _WIDENED:
            dtype = dtype_name(tensor.dtype)
            raise InputError(f"{path} has {name} in {dtype}, which float32 cannot represent: {REMEDY}")
    require_finite(tensors.items(), str(path), "use an earlier checkpoint")
    return OfficialWeights(prefix, tensors, averaged=bool(averages))


def _state_dicts(path: Path) -> list[tuple[str, dict[str, Tensor]]]:
    """The state dicts in a file, each with the names of the entries that lead to it, joined by dots."""
    found: list[tuple[str, dict[str, Tensor]]] = []
    pending: list[tuple[tuple[str, ...], Any]] = [((), _load(path))]
    while pending:
        place, content = pending.pop()
        if any(isinstance(value, Tensor) for value in content.values()) or not content:
            if place and not any(str(name).endswith(TOKENS) for name in content):
                continue  # the state of an optimizer, for example
            if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()):
                raise _not_a_state_dict(path)
            # As plain tensors: assigned to a buffer, a parameter would become a parameter of the model.
            found.append((".".join(place), {name: tensor.detach() for name, tensor in content.items()}))
        elif len(place) < _DEEPEST:
            inner = ((key, value) for key, value in content.items() if isinstance(value, Mapping))
            pending += [((*place, str(key)), value) for key, value in inner]
    if not found:
        raise _not_a_state_dict(path)
    return found


def _models(path: Path, place: str, tensors: dict[str, Tensor]) -> list[OfficialWeights]:
    """The models in a state dict: one, or one with its average under another prefix."""
    if any("H_level." in name for name in tensors):
        raise InputError(f"{path} is a checkpoint of HRM (it has H_level), not of TRM: {REMEDY}")
    # The modules that wrap the model add prefixes: `_orig_mod.`, `model.` and `inner.`, or some of them.
    prefixes = [name.removesuffix(TOKENS) for name in tensors if name.endswith(TOKENS)]
    parts: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in prefixes}
    unexpected = []
    for name, tensor in tensors.items():
        # An empty prefix begins every name.
        prefix = max((one for one in prefixes if name.startswith(one)), key=len, default=None)
        if prefix is None:
            unexpected.append(name)
        else:
            parts[prefix][name.removeprefix(prefix)] = tensor
    if prefixes:
        reject_unexpected(path, unexpected)
    return [
        OfficialWeights(prefix, part, averaged=_AVERAGE.search(f"{place}.{prefix}") is not None)
        for prefix, part in parts.items()
    ]


def _load(path: Path) -> Mapping[Any, Any]:
    if path.is_dir():
        raise InputError(f"{path} is a folder: {REMEDY}")
    content = read_torch(path, REMEDY)
    if not isinstance(content, Mapping):
        raise _not_a_state_dict(path)
    return content


def _not_a_state_dict(path: Path) -> InputError:
    return InputError(f"{path} is not a state dict, a mapping of names to tensors: {REMEDY}")


def require_tensors(path: Path, names: list[str]) -> None:
    """Raise InputError if tensors ``names`` are missing."""
    if names:
        raise InputError(f"{path} lacks {few(names)}: {REMEDY}")


def reject_unexpected(path: Path, names: list[str]) -> None:
    """Raise InputError if there are tensors ``names`` that a PuzzleTRM does not have."""
    if names:
        raise InputError(f"{path} has unexpected tensors, {few(names)}: {REMEDY}")


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")
