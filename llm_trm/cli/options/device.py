"""The ``--device`` option that commands share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    import torch

device_option = click.option(
    "--device",
    type=click.Choice(["auto", "cuda", "mps", "cpu"]),
    default="auto",
    show_default=True,
    help="auto takes CUDA (or ROCm) if there is one, else Apple's MPS, else the CPU.",
)


def resolve_device(name: str) -> torch.device:
    """The torch device that ``--device`` means; raises click.UsageError if it is not there."""
    import torch

    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in present.items() if there))
    if not present[name]:
        others = " or ".join(f"--device {kind}" for kind, there in present.items() if there)
        raise click.UsageError(f"--device {name}: no such device is visible to PyTorch; use {others}")
    return torch.device(name)
