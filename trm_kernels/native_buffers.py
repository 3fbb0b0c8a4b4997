"""Buffers that the ``native`` backend uses again.

A recursion's buffers take megabytes, and malloc gives such sizes back to the system, which fills each new
page with zeros: 5% of a training step's time at width 256 (perf, two cores).
"""

from __future__ import annotations

from collections import OrderedDict
from weakref import finalize

import torch
from torch import Tensor

#: Bytes that lie ready at most; what lay longest goes first.
MOST_BYTES = 1 << 30

# By address, those given back last at the end. Without a lock: buffers come back whenever the garbage
# collector runs, inside these functions too. Each operation on the dictionary is atomic.
_free: OrderedDict[int, Tensor] = OrderedDict()


class Buffer:
    """At least ``size`` float32 numbers of any value; others may have them once nothing refers to this."""

    def __init__(self, size: int) -> None:
        self._tensor = _take(size)
        finalize(self, _give, self._tensor).atexit = False

    def data_ptr(self) -> int:
        """Address of the first number."""
        return self._tensor.data_ptr()


def release() -> None:
    """Give all buffers that lie ready back to the system."""
    _free.clear()


def _take(size: int) -> Tensor:
    """At least ``size`` numbers, in at most twice the room."""
    fitting = [tensor for tensor in list(_free.values()) if size <= tensor.numel() <= 2 * size]
    for tensor in sorted(fitting, key=Tensor.numel):
        if _free.pop(tensor.data_ptr(), None) is not None:
            return tensor
    # Tensors made in inference mode could not be used outside it.
    with torch.inference_mode(False):
        return torch.empty(size, dtype=torch.float32)


def _give(tensor: Tensor) -> None:
    if tensor.numel() == 0:
        return
    _free[tensor.data_ptr()] = tensor
    held = sum(tensor.nbytes for tensor in list(_free.values()))
    while held > MOST_BYTES and _free:
        held -= _free.popitem(last=False)[1].nbytes
