"""Reads the file of an official checkpoint: which tensors it has, and under which prefix."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_trm.errors import InputError, one_line

TOKENS, LAYERS = "embed_tokens.embedding_weight", "L_level.layers."

#: The end of every refusal that another file would help.
REMEDY = "name a step_N file of the official code"

_ALWAYS = ("H_init", "L_init", TOKENS, "lm_head.weight", "q_head.weight", "q_head.bias")
_WIDENED = (torch.float32, torch.bfloat16, torch.float16)  # float32 holds all their values


def read_checkpoint(path: Path) -> tuple[str, dict[str, Tensor]]:
    """The prefix that all names of a checkpoint have, and its tensors by their names without it.

    Raises:
        InputError: It is none, or one of another model.
    """
    tensors = _load(path)
    if any("H_level." in name for name in tensors):
        raise InputError(f"{path} is a checkpoint of HRM (it has H_level), not of TRM: {REMEDY}")
    # Whatever wraps the model comes before its names: `_orig_mod.`, `model.` and `inner.`, or some of them.
    found = [name for name in tensors if name.endswith(TOKENS)]
    if len(found) != 1:
        raise InputError(f"{path} is no TRM checkpoint (it has no {TOKENS}): {REMEDY}")
    prefix = found[0].removesuffix(TOKENS)
    refuse_unexpected(path, [name for name in tensors if not name.startswith(prefix)])
    tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}

    missing = [name for name in _ALWAYS if name not in tensors]
    if not any(name.startswith(f"{LAYERS}0.") for name in tensors):
        missing.append(f"{LAYERS}0")
    refuse_missing(path, missing)
    for name, tensor in tensors.items():
        if tensor.dtype not in _WIDENED:
            dtype = dtype_name(tensor.dtype)
            raise InputError(f"{path} has {name} in {dtype}, which float32 does not hold: {REMEDY}")
    return prefix, tensors


def _load(path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        raise InputError(f"{path} is a folder: {REMEDY}")
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: {REMEDY}") from None
    except pickle.UnpicklingError:
        # torch's own message goes on for a page, about how to read the file in spite of the danger.
        raise InputError(f"{path} is no file of tensors alone, and others may run code: {REMEDY}") from None
    except (OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no checkpoint ({one_line(error, 120)}): {REMEDY}") from error
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    ):
        raise InputError(f"{path} holds no state dict, a mapping of names to tensors: {REMEDY}")
    return content


def refuse_missing(path: Path, names: list[str]) -> None:
    """Raise InputError if tensors ``names`` are missing."""
    if names:
        raise InputError(f"{path} lacks {_first(names)}: {REMEDY}")


def refuse_unexpected(path: Path, names: list[str]) -> None:
    """Raise InputError if there are tensors ``names`` that no PuzzleTRM has."""
    if names:
        raise InputError(f"{path} has unexpected tensors, {_first(names)}: {REMEDY}")


def _first(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")
