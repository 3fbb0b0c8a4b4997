"""The order of the training samples."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

#: Maximum number of padded lengths if each one costs a CUDA graph.
_GRAPHS = 8


def split(count: int, held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """The indices 0 .. count - 1 in two sorted parts; the second is a fraction ``held_out``, at least one."""
    chosen = random.Random(f"held out/{seed}").sample(
        range(count), min(count, max(1, round(count * held_out)))
    )
    aside = set(chosen)
    return [number for number in range(count) if number not in aside], sorted(aside)


@dataclass(frozen=True)
class EpochOrder:
    """The batches of each epoch, a function of the seed and the epoch alone.

    Samples are shuffled, those after the last complete batch are left out (different ones in each epoch), and
    the rest are sorted by length within pools of several batches, so that a batch has contexts of similar
    length. If packed rows make padding free, pools of one batch keep the batches random.

    Attributes:
        samples: Indices of the samples.
        lengths: Length of every context.
        batch_size: Batch size of all processes together.
        seed: Seed of the shuffling.
        pool: Number of batches per pool.
    """

    samples: Sequence[int]
    lengths: Sequence[int]
    batch_size: int
    seed: int
    pool: int = 32

    def __len__(self) -> int:
        """Number of batches per epoch."""
        return len(self.samples) // self.batch_size

    def batches(self, epoch: int) -> list[list[int]]:
        """The batches of ``epoch`` in order; each of P processes takes every P-th sample of a batch."""
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
    """A bucket function with at most 8 lengths up to ``longest``, all multiples of 8: few CUDA graphs."""
    from trm_kernels.graphs.buckets import multiple_of

    return multiple_of(-(-longest // (8 * _GRAPHS)) * 8)
