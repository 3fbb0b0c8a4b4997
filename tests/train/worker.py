"""Training in processes of its own; imported by a server that forks them, so that a start costs little."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

# Here, so that they are imported before the fork: the first optimizer of a process imports torch._dynamo.
import accelerate.tracking  # noqa: F401
import torch
import torch._dynamo

from llm_trm.errors import Interrupted
from llm_trm.train.phase2.trainer import TRMSequenceTrainer
from llm_trm.train.puzzle.trainer import PuzzleTrainer
from llm_trm.train.run.report import Report
from tests.puzzle import toy as puzzles
from tests.train.toy import toy_config


class StopAfter(Report):
    """Ends the process after so many batches, or sends it a signal."""

    def __init__(self, batches: int, number: int | None = None) -> None:
        self.left, self.number = batches, number

    def step(self, step: int) -> None:
        self.left -= 1
        if self.left == 0 and self.number is not None:
            signal.raise_signal(self.number)
        elif self.left == 0:
            os._exit(7)


def run(
    folder: Path,
    output: Path,
    options: dict[str, Any],
    stop_after: int | None = None,
    number: int | None = None,
) -> None:
    """Train, from the last checkpoint in ``output`` if there is one; exit code 9 if it was interrupted."""
    torch.set_num_threads(1)
    config = toy_config(folder, output=output, resume=(output / "index.json").exists(), **options)
    try:
        TRMSequenceTrainer(config, StopAfter(stop_after, number) if stop_after else None).train()
    except Interrupted:
        sys.exit(9)


def run_rank(rank: int, processes: int, port: int, *arguments: Any) -> None:
    """:func:`run` as ``accelerate launch --cpu`` would start it."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
    }
    run(*arguments)


class Held(Report):
    """Waits in the first step until a file ``go`` is in a folder, after it has written ``held`` there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def step(self, step: int) -> None:
        (self.folder / "held").touch()
        while not (self.folder / "go").exists():
            time.sleep(0.05)


def hold(folder: Path, kind: str) -> None:
    """Train ``"puzzle"`` or ``"phase2"`` on the toy in ``folder``, with a :class:`Held`."""
    torch.set_num_threads(1)
    if kind == "puzzle":
        PuzzleTrainer(puzzles.toy_config(folder), Held(folder)).train()
    else:
        TRMSequenceTrainer(toy_config(folder), Held(folder)).train()
