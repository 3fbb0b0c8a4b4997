"""Trains one network on the task, with or without fp8, and evaluates it in all precisions."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.fp8.emulation import EmulatedNetwork
from bench.fp8.task import CELLS, VOCABULARY, sources
from llm_trm.benchmark.environment import run_record
from trm_kernels import TinyRecursiveNetwork, deep_recursion
from trm_kernels.config import Family
from trm_kernels.testing import relative_error

#: Inference precisions: whether to autocast to bf16, and whether matrix products are in fp8.
MODES = {
    "float32": (False, False),
    "bf16": (True, False),
    "fp8": (False, True),
    "fp8, bf16": (True, True),
}
#: Precision of the T - 1 recursions without gradients in training; the rest is float32.
TRAININGS = ("float32", "fp8-nograd")


@dataclass(frozen=True)
class Settings:
    """Settings of the network, its training and its test.

    Attributes:
        width, layers, heads: Sizes of the network.
        n, T: Latent steps, and latent recursions per deep recursion.
        supervision: Number of deep recursions per batch, each with its own loss and update.
        batches, batch: Number of training batches, and puzzles per batch.
        rate: Peak learning rate, with warm-up over the first tenth and then linear decay.
        tested: Number of held-out puzzles.
    """

    width: int = 64
    layers: int = 2
    heads: int = 4
    n: int = 2
    T: int = 3
    supervision: int = 3
    batches: int = 150
    batch: int = 32
    rate: float = 3e-3
    tested: int = 300


class SudokuModel(nn.Module):
    """A Tiny Recursive Model for the task, from cells int64 [B, 16] to logits [B, 16, 5]."""

    initial: Tensor

    def __init__(self, family: Family, settings: Settings, device: torch.device) -> None:
        super().__init__()
        width = settings.width
        self.settings = settings
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.position = nn.Parameter(torch.randn(CELLS, width))
        self.net = TinyRecursiveNetwork(
            width,
            settings.layers,
            settings.heads,
            family=family,
            backend="triton" if device.type == "cuda" else "eager",
        )
        # Without it, the states of a pre-norm network would grow with every recursion.
        self.output_norm = nn.RMSNorm(width) if family != "paper" else None
        self.head = nn.Linear(width, VOCABULARY)
        self.register_buffer("initial", torch.randn(2, 1, 1, width))
        self.to(device)

    def states(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """The initial states (y, z), [B, 16, D] each."""
        y, z = self.initial.expand(2, *cells.shape, -1)
        return y, z

    def recurse(self, cells: Tensor, y: Tensor, z: Tensor, *, fp8: bool) -> tuple[Tensor, Tensor]:
        """One deep recursion; ``fp8`` uses the kernels on a GPU and is emulated elsewhere."""
        n, T, norm = self.settings.n, self.settings.T, self.output_norm
        x = self.embedding(cells) + self.position
        if not fp8:
            return deep_recursion(self.net, x, y, z, n, T, output_norm=norm)
        if x.is_cuda:
            return deep_recursion(self.net, x, y, z, n, T, output_norm=norm, precision="fp8-nograd")
        records = torch.is_grad_enabled()
        emulated = EmulatedNetwork(self.net)
        y, z = deep_recursion(
            emulated, x, y, z, n, T - 1 if records else T, output_norm=norm, with_gradients=False
        )
        return deep_recursion(self.net, x, y, z, n, 1, output_norm=norm) if records else (y, z)


def cross_entropy(logits: Tensor, solutions: Tensor) -> Tensor:
    """Mean cross-entropy over all cells."""
    return F.cross_entropy(logits.flatten(0, 1), solutions.flatten())


def train(model: SudokuModel, seed: int, *, fp8: bool) -> float:
    """Train, and return the mean loss of the last supervision step over the last tenth of the batches."""
    settings, device = model.settings, model.initial.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate, weight_decay=0.01, fused=True)
    puzzles, generator = sources()[0], torch.Generator().manual_seed(seed)
    warmup, last = max(1, settings.batches // 10), []
    for number in range(settings.batches):
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * min((number + 1) / warmup, 1.0 - number / settings.batches)
        cells, solutions = (tensor.to(device) for tensor in puzzles.draw(settings.batch, generator))
        y, z = model.states(cells)
        for _ in range(settings.supervision):
            y, z = model.recurse(cells, y, z, fp8=fp8)
            loss = cross_entropy(model.head(y), solutions)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            y, z = y.detach(), z.detach()
        last.append(loss.detach())
    return torch.stack(last[-warmup:]).mean().item()


@torch.no_grad()
def _loop(model: SudokuModel, cells: Tensor, *, autocast: bool, fp8: bool) -> Iterator[dict[str, Tensor]]:
    """Yield y, z and logits after every deep recursion of a supervision loop."""
    y, z = model.states(cells)
    for _ in range(model.settings.supervision):
        context: AbstractContextManager[Any] = torch.autocast(
            cells.device.type, torch.bfloat16, enabled=autocast
        )
        with context:
            y, z = model.recurse(cells, y, z, fp8=fp8)
            yield {"y": y, "z": z, "logits": model.head(y)}


def evaluate(model: SudokuModel) -> dict[str, dict[str, float]]:
    """Evaluate held-out puzzles in each of :data:`MODES`.

    Returns:
        By mode: ``loss``; ``cells``, the fraction of correct blank cells; ``exact``, the fraction of correct
        puzzles; and relative Frobenius errors against float64: ``y first`` and ``z first`` after one deep
        recursion, ``y last`` and ``z last`` after the supervision loop.
    """
    model.eval()
    drawn = sources()[1].draw(model.settings.tested, torch.Generator().manual_seed(0))
    cells, solutions = (tensor.to(model.initial.device) for tensor in drawn)
    wide = copy.deepcopy(model).double()
    wide.net.backend = "eager"
    truth = list(_loop(wide, cells, autocast=False, fp8=False))
    found = {}
    for mode, (autocast, fp8) in MODES.items():
        states = list(_loop(model, cells, autocast=autocast, fp8=fp8))
        logits = states[-1]["logits"].float()
        right = logits.argmax(dim=-1) == solutions
        found[mode] = {
            "loss": cross_entropy(logits, solutions).item(),
            "cells": right[cells == 0].float().mean().item(),
            "exact": right.all(dim=1).float().mean().item(),
        }
        for when, index in (("first", 0), ("last", -1)):
            for name in ("y", "z"):
                found[mode][f"{name} {when}"] = relative_error(states[index][name], truth[index][name])
    return found


def run(
    family: Family,
    seed: int,
    training: str,
    settings: Settings,
    device: torch.device,
    commit: str | None = None,
) -> dict[str, Any]:
    """Train and test one network, and return a line of the results file.

    Networks of the same family and seed start from the same parameters and see the same puzzles, for every
    ``training`` in :data:`TRAININGS`.
    """
    torch.manual_seed(seed)
    model = SudokuModel(family, settings, device)
    loss = train(model, seed, fp8=training == "fp8-nograd")
    record = run_record(device, commit)
    return record | {
        "device": record["machine"]["device"],
        "emulated": device.type != "cuda",
        "family": family,
        "seed": seed,
        "training": training,
        "settings": asdict(settings),
        "training_loss": loss,
        "evaluation": evaluate(model),
    }
