"""Compressed contexts in memory, and the order in which training reads them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from llm_trm.data.pairs import PairFiles
    from llm_trm.models.compression import DimensionCompressor

#: Rows that are compressed in one product.
_CHUNK = 8192
#: Lengths at most that training batches are padded to where each length costs a CUDA graph.
_GRAPHS = 8


class Batch(NamedTuple):
    """Contexts padded to one length.

    Attributes:
        context: [B, L, D'], zeros at padding.
        mask: 1 at valid positions, float32 [B, L].
        target: [B, D'].
    """

    context: Tensor
    mask: Tensor
    target: Tensor


@dataclass(frozen=True)
class Contexts:
    """Contexts of different lengths, packed, and the state that each is to lead to.

    Attributes:
        rows: Compressed states of all contexts, one behind the other, float32 [R, D'].
        offsets: First row of each context, and the end of the last, int64 [N + 1], on the CPU.
        targets: Compressed state after thinking, float32 [N, D'].
    """

    rows: Tensor
    offsets: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def width(self) -> int:
        """D'."""
        return self.rows.shape[1]

    @property
    def lengths(self) -> list[int]:
        """Length of each context."""
        return self.offsets.diff().tolist()

    def batch(self, samples: Sequence[int], bucket: Callable[[int], int] | None = None) -> Batch:
        """The samples of these numbers, padded to their longest, or to what ``bucket`` makes of that."""
        device = self.rows.device
        chosen = torch.tensor(samples)
        ends = torch.stack((self.offsets[chosen], self.offsets[chosen + 1]))
        longest = int(ends.diff(dim=0).max())
        # Only these few numbers travel; what is large is made where it is needed.
        start, end = ends.to(device, non_blocking=True)
        rows = start[:, None] + torch.arange(longest if bucket is None else bucket(longest), device=device)
        valid = rows < end[:, None]
        context = self.rows[torch.where(valid, rows, 0)] * valid[..., None]
        return Batch(context, valid.float(), self.targets[chosen.to(device, non_blocking=True)])

    def to(self, device: torch.device) -> Contexts:
        """The same with rows and targets on ``device``."""
        return replace(self, rows=self.rows.to(device), targets=self.targets.to(device))

    def digest(self) -> str:
        """A short fingerprint of lengths and targets, which any other data or compressor changes."""
        content = hashlib.sha256(self.offsets.numpy().tobytes())
        content.update(self.targets.cpu().numpy().tobytes())
        return content.hexdigest()[:16]


@torch.no_grad()
def read_contexts(pairs: PairFiles, compressor: DimensionCompressor, device: torch.device) -> Contexts:
    """Compress a folder of pairs shard by shard; the result lies on the CPU.

    Args:
        compressor: On ``device``, where the products run.

    Raises:
        InputError: A shard that is missing, truncated, or holds NaN or infinity.
    """
    weight = compressor.compress.weight

    def compress(states: Tensor) -> Tensor:
        chunks = states.split(_CHUNK)
        return torch.cat([compressor(chunk.to(device, weight.dtype)).float().cpu() for chunk in chunks])

    rows = [torch.empty(0, weight.shape[0])]
    targets = [torch.empty(0, weight.shape[0])]
    lengths = [torch.zeros(1, dtype=torch.int64)]
    for shard in pairs.shards():
        if len(shard.hidden_post):
            rows.append(compress(shard.hidden_pre))
            targets.append(compress(shard.hidden_post))
            lengths.append(shard.offsets.diff())
    return Contexts(torch.cat(rows), torch.cat(lengths).cumsum(0), torch.cat(targets))


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
