"""The order in which training reads contexts."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

#: Lengths at most that training batches are padded to where each length costs a CUDA graph.
_GRAPHS = 8


def split(count: int, held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """Numbers 0 .. count - 1 in two sorted parts, the second of ``held_out`` of them, at least one."""
    chosen = random.Random(f"held out/{seed}").sample(
        range(count), min(count, max(1, round(count * held_out)))
    )
    aside = set(chosen)
    return [number for number in range(count) if number not in aside], sorted(aside)


@dataclass(frozen=True)
class EpochOrder:
    """Batches of each epoch, a function of the seed and the epoch alone.

    Samples are shuffled, those beyond the last whole batch left out (others in each epoch), and the rest
    sorted by length in pools of some batches, so that a batch has contexts of similar length. Where packed
    rows make padding free, pools of one batch keep the batches random.

    Attributes:
        samples: Numbers of the samples.
        lengths: Length of every context, indexed by such a number.
        batch_size: Samples of a batch, of all processes together.
        seed: Of the shuffling.
        pool: Batches of a pool.
    """

    samples: Sequence[int]
    lengths: Sequence[int]
    batch_size: int
    seed: int
    pool: int = 32

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.samples) // self.batch_size

    def batches(self, epoch: int) -> list[list[int]]:
        """The batches of ``epoch`` in their order; a process of P takes every P-th sample of each."""
        chance = random.Random(f"epoch/{self.seed}/{epoch}")
        order = list(self.samples)
        chance.shuffle(order)
        del order[len(self) * self.batch_size :]
        batches = []
        pool = self.pool * self.batch_size
        for start in range(0, len(order), pool):
            alike = sorted(order[start : start + pool], key=self.lengths.__getitem__)
            batches += [alike[at : at + self.batch_size] for at in range(0, len(alike), self.batch_size)]
        chance.shuffle(batches)
        return batches


def graph_lengths(longest: int) -> Callable[[int], int]:
    """A bucket that makes at most 8 lengths, multiples of 8, of all up to ``longest``: few CUDA graphs."""
    from trm_kernels.graphs.buckets import multiple_of

    return multiple_of(-(-longest // (8 * _GRAPHS)) * 8)
