"""Compressed contexts in memory, and error metrics of predictions against their targets."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from llm_trm.data.pairs import PairFiles
    from llm_trm.models.compression import DimensionCompressor

#: Number of rows to compress at a time.
_CHUNK = 8192


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
    """Packed contexts of different lengths, and the target state of each.

    Attributes:
        rows: Compressed states of all contexts, concatenated, float32 [R, D'].
        offsets: First row of each context and the end of the last, int64 [N + 1], on the CPU.
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
        """The samples at these indices, padded to the longest length, or to ``bucket`` of that length."""
        device = self.rows.device
        chosen = torch.tensor(samples)
        ends = torch.stack((self.offsets[chosen], self.offsets[chosen + 1]))
        longest = int(ends.diff(dim=0).max())
        # Transfer only the offsets; build the large tensors on the device.
        start, end = ends.to(device, non_blocking=True)
        rows = start[:, None] + torch.arange(longest if bucket is None else bucket(longest), device=device)
        valid = rows < end[:, None]
        context = self.rows[torch.where(valid, rows, 0)] * valid[..., None]
        return Batch(context, valid.float(), self.targets[chosen.to(device, non_blocking=True)])

    def to(self, device: torch.device) -> Contexts:
        """A copy with rows and targets on ``device``."""
        return replace(self, rows=self.rows.to(device), targets=self.targets.to(device))

    def digest(self) -> str:
        """A short fingerprint of lengths and targets, which identifies the data and the compressor."""
        content = hashlib.sha256(self.offsets.numpy().tobytes())
        content.update(self.targets.cpu().numpy().tobytes())
        return content.hexdigest()[:16]


@torch.no_grad()
def read_contexts(pairs: PairFiles, compressor: DimensionCompressor, device: torch.device) -> Contexts:
    """Compress a folder of pairs shard by shard; the result is on the CPU.

    Args:
        compressor: A compressor on ``device``.

    Raises:
        InputError: A shard is missing or truncated, or contains NaN or infinity.
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


def errors(prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Errors of predictions [B, D'] against targets [B, D'] per sample [B], computed in float32.

    Returns:
        ``mse``: mean squared error over D'. ``cosine``: cosine similarity. ``relative_error``: norm of the
        difference divided by the norm of the target.
    """
    prediction, target = prediction.float(), target.float()
    difference = prediction - target
    return {
        "mse": difference.square().mean(dim=-1),
        "cosine": F.cosine_similarity(prediction, target, dim=-1),
        "relative_error": difference.norm(dim=-1) / target.norm(dim=-1).clamp_min(1e-12),
    }
