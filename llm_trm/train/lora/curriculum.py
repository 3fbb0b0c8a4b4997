"""A curriculum that removes written thinking step by step (Coconut, arXiv 2412.06769)."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

#: Where a step of thinking ends: at a line, else at a semicolon, else at a sentence.
_STEP_ENDS = (re.compile(r"(?<=\n)"), re.compile(r"(?<=;)"), re.compile(r"(?<=[.!?]\s)"))


def thinking_steps(thinking: str) -> list[str]:
    """``thinking`` split into steps; joined, they are ``thinking`` again."""
    for end in _STEP_ENDS:
        steps = [step for step in end.split(thinking) if step]
        if len(steps) > 1:
            return steps
    return [thinking] if thinking else []


def thinking_left(thinking: str, stage: int, stages: int) -> str:
    """The thinking of ``stage`` of 0 .. ``stages``: all but its first ``stage`` steps, at last none."""
    return "" if stage >= stages else "".join(thinking_steps(thinking)[stage:])


class StagedOrder(Sampler[int]):
    """A random order per epoch, with the curriculum's stage in the index: ``stage * count + index``.

    Order and stage depend on the seed and the position alone, so that a resumed run, other processes and the
    workers of a data loader agree. The stages before the last share the first half of the training equally.

    Args:
        count: Number of samples.
        stages: The last stage; 0 for no curriculum.
        seed: Seed of the order.

    Attributes:
        epoch: The epoch, counted from 0.
        epochs: Epochs of the whole training, a fraction if it ends within one.
    """

    def __init__(self, count: int, stages: int, seed: int) -> None:
        self._count, self._stages, self._seed = count, stages, seed
        self.epoch = 0
        self.epochs = 1.0

    def set_epoch(self, epoch: int) -> None:
        """Start epoch ``epoch``, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self.epoch)
        for place, index in enumerate(torch.randperm(self._count, generator=generator).tolist()):
            done = (self.epoch + place / self._count) / self.epochs
            yield self.stage(done) * self._count + index

    def stage(self, done: float) -> int:
        """The stage when the fraction ``done`` of the training is done, in [0, 1]."""
        return min(self._stages, int(2 * done * self._stages))
