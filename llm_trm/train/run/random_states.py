"""States of the random number generators as tensors, for checkpoints."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from llm_trm.errors import InputError
from llm_trm.train.run.settings import START_OVER


def random_states(device: torch.device) -> dict[str, Tensor]:
    """States of Python's generator, of torch's on the CPU, and of that of ``device`` if it is a GPU."""
    _, words, gauss = random.getstate()
    states = {"python": torch.tensor(words), "torch": torch.get_rng_state()}
    if gauss is not None:
        states["python_gauss"] = torch.tensor(gauss, dtype=torch.float64)
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(states: Mapping[str, Tensor], device: torch.device, where: Path) -> None:
    """Set the generators to the states that :func:`random_states` returned.

    Args:
        where: The checkpoint that ``states`` are from, for the message.

    Raises:
        InputError: A state is missing, or is none.
    """
    try:
        gauss = states.get("python_gauss")
        words = tuple(states["python"].tolist())
        random.setstate((3, words, None if gauss is None else float(gauss)))
        torch.set_rng_state(states["torch"])
        if device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], device)
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(f"{where} has no states of the random number generators: {START_OVER}") from error
