"""Ragged batches as packed rows: the valid positions of all samples one behind the other, without padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where the valid positions of a padded batch [B, L] lie among R packed rows.

    Everything stays on the device and nothing waits for it: the number of valid rows is a device tensor that
    the kernels read. So R may be larger than that number; the rows behind it hold nothing.

    Attributes:
        batch, length: B and L.
        starts: First row of each sample, and the end of the last, int32 [B + 1] (``cu_seqlens``).
        count: Number of valid rows, int32 [1].
        index: Padded position (b L + l) of each packed row, int64 [R]; 0 in rows that hold nothing.
        place: Packed row of each padded position, int64 [B L]; any row where the position is not valid.
        mask: Validity of each padded position, bool [B, L].
    """

    batch: int
    length: int
    starts: Tensor
    count: Tensor
    index: Tensor
    place: Tensor
    mask: Tensor

    @classmethod
    def of(cls, mask: Tensor, rows: int | None = None) -> Packing:
        """Pack the positions where ``mask`` [B, L] is not 0, any pattern, in order.

        Args:
            rows: R, at least the number of valid positions (B L if not given). A caller who knows the lengths
                saves memory with it; too small a number loses rows.
        """
        mask = mask != 0
        batch, length = mask.shape
        rows = batch * length if rows is None else rows
        flat = mask.reshape(-1)
        place = (flat.cumsum(0) - 1).clamp_(0, rows - 1)
        # One more row than there are takes the positions that are not valid.
        index = place.new_zeros(rows + 1)
        positions = torch.arange(batch * length, device=mask.device)
        index.scatter_(0, torch.where(flat, place, rows), positions)
        lengths = mask.sum(dim=1, dtype=torch.int32)
        starts = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        return cls(batch, length, starts, starts[-1:].clone(), index[:rows], place, mask)

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
        rows = x.reshape(-1, width).index_select(0, self.place).view(self.batch, self.length, width)
        return rows.masked_fill_(~self.mask[..., None], 0.0)


class _Gather(torch.autograd.Function):
    """Packing and unpacking, each the other's backward: gathers both ways, where autograd would scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packing: Packing, padded: bool) -> Tensor:
        ctx.packing, ctx.padded = packing, padded
        return packing._gather(x, padded)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Gather.apply(grad, ctx.packing, not ctx.padded), None, None


def read_positions(x: Tensor, read: Tensor) -> Tensor:
    """``x`` [B, L, D] at positions ``read`` [B, K], int64: [B, K, D]."""
    return x.gather(1, read[..., None].expand(-1, -1, x.shape[-1]))
