"""Batches of puzzles, in an order that a step's number decides."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llm_trm.data.puzzles.dataset import PuzzleSplit

Augment = Callable[[Tensor, Tensor], "tuple[Tensor, Tensor]"]


class Feed:
    """Goes through a split again and again, each time in another order.

    Samples of one puzzle identifier follow each other, as in the official batches: the sign-SGD of its
    embedding then takes one step for all of them, and not one for each.

    Args:
        split: At least one puzzle, on the device that batches are wanted on.
        batch_size: B; a split with fewer puzzles is repeated in a batch.
        seed: Of the orders.
        augment: Turns every sample by a random symmetry; None for none.
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
