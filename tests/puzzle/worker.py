"""Puzzle training in separate processes; imported by a server that forks them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Imported here, before the fork, because the first optimizer of a process imports it.
import torch
import torch._dynamo

from llm_trm.train.puzzle.trainer import PuzzleTrainer
from tests.puzzle.toy import toy_config


def run(folder: Path, output: Path, options: dict[str, Any]) -> None:
    """Train, resuming from the last checkpoint in ``output`` if there is one."""
    torch.set_num_threads(1)
    config = toy_config(folder, output=output, resume=(output / "index.json").exists(), **options)
    PuzzleTrainer(config).train()
