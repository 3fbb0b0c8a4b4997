"""Tensors that are made once, on one CUDA stream, and read on any other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Shared:
    """Tensors of one device, made by work that is on its current stream; :meth:`read` gives them to any.

    On a CPU, and on the stream that made them, nothing is waited for.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        first = self.tensors[0]
        self._maker = torch.cuda.current_stream(first.device) if first.is_cuda else None
        self._made = None if self._maker is None else self._maker.record_event()

    def read(self) -> list[Tensor]:
        """The tensors, for work that the current stream gets from now on."""
        if self._maker is None or self._made is None:
            return self.tensors
        current = torch.cuda.current_stream(self.tensors[0].device)
        if current != self._maker:
            current.wait_event(self._made)
            for tensor in self.tensors:
                # Dropped while this stream's work is still queued, its memory would go to the maker's stream
                # at once.
                tensor.record_stream(current)
        return self.tensors
