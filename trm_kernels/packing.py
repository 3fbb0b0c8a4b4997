"""Ragged batches as packed rows: the valid positions of all samples one behind the other, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Where the valid positions of a padded batch [B, L] lie among R packed rows.

    Attributes:
        batch, length: B and L.
        index: Padded position (b L + l) of each packed row, int64 [R]; 0 in rows that hold nothing.
        place: Packed row of each padded position, int64 [B L]; any row where the position is not valid.
        mask: Validity of each padded position, bool [B, L].
    """

    batch: int
    length: int
    index: Tensor
    place: Tensor
    mask: Tensor

    @property
    def rows(self) -> int:
        """R."""
        return self.index.shape[0]

    def pack(self, x: Tensor) -> Tensor:
        """Packed rows [1, R, D] of ``x`` [B, L, D]."""
        return _Gather.apply(x, self, False)

    def unpack(self, x: Tensor) -> Tensor:
        """``x`` [1, R, D] at its padded positions [B, L, D]; zeros where the mask is 0."""
        return _Gather.apply(x, self, True)

    def positions(self) -> Tensor:
        """Position l of each packed row in its sample, int64 [R]."""
        return self.index % self.length

    def _gather(self, x: Tensor, padded: bool) -> Tensor:
        width = x.shape[-1]
        if not padded:
            return x.reshape(-1, width).index_select(0, self.index)[None]
        rows = x.reshape(-1, width).index_select(0, self.place)
        # The view comes last: compiled by torch 2.11, an autograd.Function whose forward returns what it
        # wrote in place has a gradient of zeros (not so by 2.10, 2.12 and 2.13).
        return rows.masked_fill_(~self.mask.reshape(-1, 1), 0.0).view(self.batch, self.length, width)


@dataclass(frozen=True)
class Packing(Rows):
    """Packed rows in the order of the samples, for kernels.

    Everything stays on the device and nothing waits for it: the number of valid rows is a device tensor that
    the kernels read. So R may be larger than that number; the rows behind it hold nothing.

    Attributes:
        starts: First row of each sample, and the end of the last, int32 [B + 1] (``cu_seqlens``).
        count: Number of valid rows, int32 [1].
        lengths: Number of valid positions of each sample, where the caller knows them on the host: with them
            the ``eager`` and ``compile`` backends pack rows on devices that they may not wait for.
    """

    starts: Tensor
    count: Tensor
    lengths: tuple[int, ...] | None = None

    @classmethod
    def of(cls, mask: Tensor, rows: int | None = None, lengths: Sequence[int] | None = None) -> Packing:
        """Pack the positions where ``mask`` [B, L] is not 0, any pattern, in order.

        Args:
            rows: R, at least the number of valid positions (if not given, the sum of ``lengths``, else B L).
                A caller who knows the lengths saves memory with it; too small a number loses rows.
            lengths: Number of valid positions of each sample; must be that of the mask, which is not read.
        """
        mask = mask != 0
        batch, length = mask.shape
        if lengths is not None and (len(lengths) != batch or not all(0 <= n <= length for n in lengths)):
            raise ValueError(f"expected {batch} lengths of at most {length}, got {list(lengths)}")
        if rows is None:
            rows = batch * length if lengths is None else max(1, sum(lengths))
        flat = mask.reshape(-1)
        place = (flat.cumsum(0) - 1).clamp_(0, rows - 1)
        # One more row than there are takes the positions that are not valid.
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
    """Packing and unpacking, each the other's backward: gathers both ways, where autograd would scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packing: Rows, padded: bool) -> Tensor:
        ctx.packing, ctx.padded = packing, padded
        return packing._gather(x, padded)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Gather.apply(grad, ctx.packing, not ctx.padded), None, None


def read_positions(x: Tensor, read: Tensor) -> Tensor:
    """``x`` [B, L, D] at positions ``read`` [B, K], int64: [B, K, D]."""
    return x.gather(1, read[..., None].expand(-1, -1, x.shape[-1]))
