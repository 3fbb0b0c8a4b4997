"""Ragged batches as packed rows: the valid positions of all samples one after another, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Mapping between the valid positions of a padded batch [B, L] and R packed rows.

    Attributes:
        batch, length: B and L.
        index: Padded position (b L + l) of each packed row, int64 [R]; 0 in unused rows.
        place: Packed row of each padded position, int64 [B L]; an arbitrary row if the position is invalid.
        mask: Validity of each padded position, bool [B, L].
    """

    batch: int
    length: int
    index: Tensor
    place: Tensor
    mask: Tensor

    @property
    def rows(self) -> int:
        """Number of packed rows R."""
        return self.index.shape[0]

    def pack(self, x: Tensor) -> Tensor:
        """Gather ``x`` [B, L, D] into packed rows [1, R, D]."""
        return _Gather.apply(x, self, False)

    def unpack(self, x: Tensor) -> Tensor:
        """Return ``x`` [1, R, D] at its padded positions [B, L, D], with zeros where the mask is 0."""
        return _Gather.apply(x, self, True)

    def positions(self) -> Tensor:
        """Return the position l of each packed row in its sample, int64 [R]."""
        return self.index % self.length

    def _gather(self, x: Tensor, padded: bool) -> Tensor:
        width = x.shape[-1]
        if not padded:
            return x.reshape(-1, width).index_select(0, self.index)[None]
        rows = x.reshape(-1, width).index_select(0, self.place)
        # The view comes last: torch.compile of torch 2.11 returns zero gradients for an autograd.Function
        # whose forward returns a tensor that it modified in place (2.10, 2.12 and 2.13 do not).
        return rows.masked_fill_(~self.mask.reshape(-1, 1), 0.0).view(self.batch, self.length, width)


@dataclass(frozen=True)
class Packing(Rows):
    """Packed rows in sample order, for kernels.

    Everything stays on the device without synchronisation: kernels read the number of valid rows from a
    device tensor. R may therefore be larger than that number; the rows after it are unused.

    Attributes:
        starts: First row of each sample and the end of the last, int32 [B + 1] (``cu_seqlens``).
        count: Number of valid rows, int32 [1].
        lengths: Number of valid positions of each sample, if the caller knows them on the host. The ``eager``
            and ``compile`` backends need them to pack rows on a device without synchronising with it.
    """

    starts: Tensor
    count: Tensor
    lengths: tuple[int, ...] | None = None

    @classmethod
    def of(cls, mask: Tensor, rows: int | None = None, lengths: Sequence[int] | None = None) -> Packing:
        """Pack the positions where ``mask`` [B, L] is not 0, in order. The mask may have any pattern.

        Args:
            rows: R, at least the number of valid positions. The default is the sum of ``lengths``, or else
                B L. A smaller R saves memory; if R is too small, rows are lost.
            lengths: Number of valid positions of each sample. They must match the mask, which is not
                checked.
        """
        mask = mask != 0
        batch, length = mask.shape
        if lengths is not None and (len(lengths) != batch or not all(0 <= n <= length for n in lengths)):
            raise ValueError(f"expected {batch} lengths of at most {length}, got {list(lengths)}")
        if rows is None:
            rows = batch * length if lengths is None else max(1, sum(lengths))
        flat = mask.reshape(-1)
        place = (flat.cumsum(0) - 1).clamp_(0, rows - 1)
        # Invalid positions are scattered to one extra row.
        index = place.new_zeros(rows + 1)
        positions = torch.arange(batch * length, device=mask.device)
        index.scatter_(0, torch.where(flat, place, rows), positions)
        counts = mask.sum(dim=1, dtype=torch.int32)
        starts = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
        return cls(
            batch,
            length,
            index[:rows],
            place,
            mask,
            starts=starts,
            count=starts[-1:].clone(),
            lengths=None if lengths is None else tuple(lengths),
        )


class _Gather(torch.autograd.Function):
    """Packing or unpacking, each the backward of the other. Both gather, where autograd would scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packing: Rows, padded: bool) -> Tensor:
        ctx.packing, ctx.padded = packing, padded
        return packing._gather(x, padded)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Gather.apply(grad, ctx.packing, not ctx.padded), None, None


def read_positions(x: Tensor, read: Tensor) -> Tensor:
    """Return ``x`` [B, L, D] at positions ``read`` [B, K] (int64), as [B, K, D]."""
    return x.gather(1, read[..., None].expand(-1, -1, x.shape[-1]))
