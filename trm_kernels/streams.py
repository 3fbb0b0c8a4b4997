"""Tensors that are computed once on one CUDA stream and read on any stream."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Shared:
    """Tensors of one device, computed on its current stream. :meth:`read` makes them safe on any stream.

    On a CPU, and on the stream that computed them, reading does not wait.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        first = self.tensors[0]
        self._maker = torch.cuda.current_stream(first.device) if first.is_cuda else None
        self._made = None if self._maker is None else self._maker.record_event()

    def read(self) -> list[Tensor]:
        """Return the tensors, ready for work enqueued on the current stream after this call."""
        if self._maker is None or self._made is None:
            return self.tensors
        current = torch.cuda.current_stream(self.tensors[0].device)
        if current != self._maker:
            current.wait_event(self._made)
            for tensor in self.tensors:
                # Otherwise, if the tensor is freed while this stream's work is queued, the allocator reuses
                # its memory on the maker's stream immediately.
                tensor.record_stream(current)
        return self.tensors
