"""What puzzle training reads before it trains: a data set and its test puzzles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from llm_trm.data.puzzles.augment import augmentation
from llm_trm.data.puzzles.dataset import PuzzleInfo, PuzzleSplit, read_info, read_split, repeated
from llm_trm.errors import InputError
from llm_trm.evaluate.puzzle import draw_puzzles, with_answers
from llm_trm.train.puzzle.config import PuzzleConfig
from llm_trm.train.puzzle.feed import Augment


@dataclass(frozen=True)
class Inputs:
    """What puzzle training learns from.

    Attributes:
        info: Describes the data set.
        training, held_out: Puzzles to learn from and to evaluate on, on the device.
        repeated: Number of test puzzles that are training puzzles too.
        symmetries: Applies a random symmetry of the task to each sample; None for none.
        identity: What a resumed run's data must share with the run's.
    """

    info: PuzzleInfo
    training: PuzzleSplit
    held_out: PuzzleSplit
    repeated: int
    symmetries: Augment | None
    identity: dict[str, Any]


def read_inputs(config: PuzzleConfig, device: torch.device) -> Inputs:
    """Read the puzzles of ``config.data``; InputError if there are none to train on."""
    info = read_info(config.data)
    training, test = read_split(config.data, "train"), with_answers(read_split(config.data, "test"))
    if not len(training):
        raise InputError(f"{config.data} has no training puzzles: make some with `llm-trm data {info.task}`")
    # Not the first ones: those of ARC are the copies of one task. The same for every seed.
    held_out = draw_puzzles(test, config.eval_samples, seed=0)
    return Inputs(
        info=info,
        training=training.to(device),
        held_out=held_out.to(device),
        # `llm-trm data arc` makes sure that no test of ARC is learned; a question may occur twice there.
        repeated=0 if info.task == "arc" else repeated(test, training),
        symmetries=augmentation(info) if config.augment else None,
        identity={
            "task": info.task,
            "puzzles": len(training),
            "train": training.digest(),
            "test": test.digest(),
        },
    )
