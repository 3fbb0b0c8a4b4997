"""Reconstructs compressed hidden states, and measures the difference."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_trm.models.compression import Compressor, DimensionCompressor, LatentDecoder
from llm_trm.ranges import FINITE

#: States [rows, D] and None, or sequences [B, L, D] with their mask [B, L].
Batch = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Quality:
    """How well states h were reconstructed as r.

    Attributes:
        mse: Mean of (r - h)^2 over all elements.
        cosine_similarity: Mean over the states of cos(r, h).
        relative_error: |r - h| / |h|, Frobenius norms over all states.
    """

    mse: Annotated[float, FINITE]
    cosine_similarity: Annotated[float, FINITE]
    relative_error: Annotated[float, FINITE]


class Reconstruction(nn.Module):
    """A compressor and its decoder as one module, so that DDP sees the forward pass.

    Args:
        compressor: A :class:`DimensionCompressor` is its own decoder; others need one.
        decoder: Decoder of a latent compressor.
    """

    def __init__(self, compressor: Compressor, decoder: LatentDecoder | None = None) -> None:
        super().__init__()
        if isinstance(compressor, DimensionCompressor) == (decoder is not None):
            raise ValueError("a latent compressor needs a decoder, and a dimension compressor takes none")
        self.compressor = compressor
        self.decoder = decoder

    def forward(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """Reconstruct a :data:`Batch` in float32, also under autocast: same shape as ``states``."""
        with torch.autocast(states.device.type, enabled=False):
            if isinstance(self.compressor, DimensionCompressor):
                return self.compressor.decompress(self.compressor(states))
            assert self.decoder is not None
            return self.decoder(self.compressor(states, mask), states.shape[1])


@torch.no_grad()
def quality(reconstruct: Callable[[Tensor, Tensor | None], Tensor], batches: Iterable[Batch]) -> Quality:
    """Measure ``reconstruct(states, mask)`` over batches; sums in float64, read once at the end."""
    rows = width = 0
    sums: Tensor | None = None
    for states, mask in batches:
        valid = slice(None) if mask is None else mask
        found, wanted = reconstruct(states, mask)[valid], states[valid]
        parts = (
            (found - wanted).square().sum(),
            wanted.square().sum(),
            F.cosine_similarity(found, wanted, dim=-1).sum(),
        )
        part = torch.stack(parts).cpu().double()
        sums = part if sums is None else sums + part
        rows += len(wanted)
        width = wanted.shape[-1]
    if sums is None:
        raise ValueError("quality over no states")
    error, power, cosine = sums.tolist()
    return Quality(error / (rows * width), cosine / rows, (error / power) ** 0.5)
