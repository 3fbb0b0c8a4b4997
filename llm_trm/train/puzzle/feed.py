"""Batches of puzzles, in an order that depends only on the step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llm_trm.data.puzzles.dataset import PuzzleSplit

Augment = Callable[[Tensor, Tensor], "tuple[Tensor, Tensor]"]


class Feed:
    """Iterates over a split again and again, each time in a different order.

    Samples with the same puzzle identifier are adjacent, as in the official batches: the sign-SGD of the
    embedding then makes one step for all of them instead of one for each.

    Args:
        split: At least one puzzle, on the device for the batches.
        batch_size: B; a split with fewer puzzles is repeated within a batch.
        seed: Seed of the orders.
        augment: Applies a random symmetry to every sample; None for none.
    """

    def __init__(self, split: PuzzleSplit, batch_size: int, seed: int, augment: Augment | None) -> None:
        self.split, self.batch_size = split, batch_size
        self._seed, self._augment = seed, augment
        self._puzzles = split.puzzles.long().cpu()
        self._epoch, self._order = -1, torch.empty(0)

    def batch(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Batch ``number``, from 0: inputs and labels [B, L] and puzzle identifiers [B]."""
        size, count = self.batch_size, len(self.split)
        epoch, place = divmod(number, max(1, count // size))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed((1_000_003 * self._seed + epoch) % 2**64)
            order = torch.randperm(count, generator=generator)
            places = torch.randperm(int(self._puzzles.max()) + 1, generator=generator)
            order = order[places[self._puzzles[order]].argsort(stable=True)].repeat(-(-size // count))
            self._epoch, self._order = epoch, order.to(self.split.inputs.device)
        rows = self._order[place * size : (place + 1) * size]
        inputs, labels = self.split.inputs[rows], self.split.labels[rows]
        if self._augment is not None:
            inputs, labels = self._augment(inputs, labels)
        return inputs, labels, self.split.puzzles[rows]
