"""Reads the tensors of an official checkpoint and the prefix of their names."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_trm.errors import InputError, one_line

TOKENS, LAYERS = "embed_tokens.embedding_weight", "L_level.layers."

#: The remedy in every error that another file would solve.
REMEDY = "name a step_N file of the official code"

_ALWAYS = ("H_init", "L_init", TOKENS, "lm_head.weight", "q_head.weight", "q_head.bias")
_WIDENED = (torch.float32, torch.bfloat16, torch.float16)  # float32 represents all their values


def read_checkpoint(path: Path) -> tuple[str, dict[str, Tensor]]:
    """The common prefix of a checkpoint's names, and its tensors by name without the prefix.

    Raises:
        InputError: The file is not a checkpoint, or belongs to another model.
    """
    tensors = _load(path)
    if any("H_level." in name for name in tensors):
        raise InputError(f"{path} is a checkpoint of HRM (it has H_level), not of TRM: {REMEDY}")
    # The modules that wrap the model add prefixes: `_orig_mod.`, `model.` and `inner.`, or some of them.
    found = [name for name in tensors if name.endswith(TOKENS)]
    if len(found) != 1:
        raise InputError(f"{path} is not a TRM checkpoint (it has no {TOKENS}): {REMEDY}")
    prefix = found[0].removesuffix(TOKENS)
    reject_unexpected(path, [name for name in tensors if not name.startswith(prefix)])
    tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}

    missing = [name for name in _ALWAYS if name not in tensors]
    if not any(name.startswith(f"{LAYERS}0.") for name in tensors):
        missing.append(f"{LAYERS}0")
    require_tensors(path, missing)
    for name, tensor in tensors.items():
        if tensor.dtype not in _WIDENED:
            dtype = dtype_name(tensor.dtype)
            raise InputError(f"{path} has {name} in {dtype}, which float32 cannot represent: {REMEDY}")
    return prefix, tensors


def _load(path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        raise InputError(f"{path} is a folder: {REMEDY}")
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: {REMEDY}") from None
    except pickle.UnpicklingError:
        # torch's own message is a page long and explains how to load the file in spite of the danger.
        raise InputError(
            f"{path} contains objects other than tensors, which could run code: {REMEDY}"
        ) from None
    except (OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not a checkpoint ({one_line(error, 120)}): {REMEDY}") from error
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    ):
        raise InputError(f"{path} is not a state dict, a mapping of names to tensors: {REMEDY}")
    return content


def require_tensors(path: Path, names: list[str]) -> None:
    """Raise InputError if tensors ``names`` are missing."""
    if names:
        raise InputError(f"{path} lacks {_first(names)}: {REMEDY}")


def reject_unexpected(path: Path, names: list[str]) -> None:
    """Raise InputError if there are tensors ``names`` that a PuzzleTRM does not have."""
    if names:
        raise InputError(f"{path} has unexpected tensors, {_first(names)}: {REMEDY}")


def _first(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")
