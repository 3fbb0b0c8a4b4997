"""The torch device that a name means."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_trm.errors import InputError

if TYPE_CHECKING:
    import torch


def resolve_device(name: str) -> torch.device:
    """The device that ``auto``, ``cuda``, ``mps`` or ``cpu`` means here; InputError if PyTorch sees none."""
    import torch

    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in present.items() if there))
    if not present[name]:
        others = " or ".join(f"--device {kind}" for kind, there in present.items() if there)
        raise InputError(f"--device {name}: no such device is visible to PyTorch; use {others}")
    return torch.device(name)
