"""A toy task: 3 x 3 grids whose answer is the question with every token increased by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llm_trm.data.puzzles.dataset import PuzzleInfo, PuzzleSplit, write_puzzles
from llm_trm.models.puzzle.paper import PuzzleTRM
from llm_trm.train.puzzle.config import PuzzleConfig
from llm_trm.train.run.checkpoints import Checkpoints
from llm_trm.weights import read_tensors

VOCABULARY, PUZZLES = 7, 5


def write_toy(folder: Path, count: int = 60) -> Path:
    """Write puzzles with identifiers, as in ARC; one cell of each is ignored."""
    chance = torch.Generator().manual_seed(0)

    def split(number: int) -> PuzzleSplit:
        inputs = torch.randint(1, VOCABULARY - 1, (number, 9), generator=chance)
        labels = inputs + 1
        labels[:, 4] = 0
        ids = torch.randint(PUZZLES, (number,), generator=chance)
        return PuzzleSplit(inputs.to(torch.uint8), labels.to(torch.uint8), ids.to(torch.int32))

    info = PuzzleInfo("arc", 3, 3, VOCABULARY, PUZZLES)
    write_puzzles(folder, info, {"train": split(count), "test": split(20)})
    return folder


def toy_config(folder: Path, **options: Any) -> PuzzleConfig:
    """Settings of a run in ``folder / "run"`` on the puzzles in ``folder``."""
    settings: dict[str, Any] = {
        "d_model": 16,
        "n_layers": 1,
        "n_heads": 2,
        "puzzle_len": 2,
        "puzzle_dim": 20,
        "n_latent_steps": 1,
        "n_deep_recursions": 2,
        "max_steps": 3,
        "steps": 12,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "warmup_steps": 3,
        "puzzle_learning_rate": 1e-2,
        "ema_decay": 0.9,
        "eval_every": 6,
        "log_every": 2,
        "output": folder / "run",
        "device": "cpu",
    }
    return PuzzleConfig(data=folder, **settings | options)


@torch.no_grad()
def drawn_alike(model: PuzzleTRM, seed: int) -> PuzzleTRM:
    """``model`` with the same random weights and initial states on every torch, which determine the halting.

    trunc_normal_ gives different values in torch 2.11 and 2.13; normal_ gives the same.
    """
    torch.manual_seed(seed)
    for tensor in (*model.parameters(), model.y_init, model.z_init):
        if tensor.ndim == 2:
            tensor.normal_(std=tensor.shape[1] ** -0.5)
        elif tensor is not model.q_head.bias:
            tensor.normal_()
    return model


def content_of(output: Path) -> dict[str, list[float]]:
    """All values in the last checkpoint of a run, except its duration."""
    found = read_tensors(Checkpoints(output).last / "state.safetensors", "")
    found |= read_tensors(Checkpoints(output).last / "puzzle_trm.safetensors", "")
    return {name: tensor.double().flatten().tolist() for name, tensor in found.items()}
