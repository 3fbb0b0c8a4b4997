"""Buffers that the ``native`` backend uses again.

A recursion's buffers take megabytes, and malloc gives such sizes back to the system, which fills each new
page with zeros: 5% of a training step's time at width 256 (perf, two cores).
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from contextlib import suppress
from weakref import finalize

import torch
from torch import Tensor

#: Bytes that lie ready at most; what lay longest goes first.
MOST_BYTES = 1 << 30

# By address, those given back last at the end. Without a lock: buffers come back whenever the garbage
# collector runs, inside these functions too, and between any two steps of an iteration.
_free: OrderedDict[int, Tensor] = OrderedDict()


def take(size: int) -> Tensor:
    """At least ``size`` float32 numbers of any value, for others once nothing refers to their memory.

    The tensor that is handed out does not tell when that is: hooks on saved tensors and views hold its memory
    under another one. So the memory is lent to a storage by way of an object that it holds until it is freed.
    """
    whole = _find(max(1, size))
    lent = (ctypes.c_float * whole.numel()).from_address(whole.data_ptr())
    finalize(lent, _give, whole).atexit = False
    # Tensors made in inference mode could not be used outside it.
    with torch.inference_mode(False):
        return torch.frombuffer(lent, dtype=torch.float32)


def release() -> None:
    """Give all buffers that lie ready back to the system."""
    _free.clear()


def _find(size: int) -> Tensor:
    """At least ``size`` numbers, in at most twice the room."""
    fitting = [tensor for tensor in _ready() if size <= tensor.numel() <= 2 * size]
    for tensor in sorted(fitting, key=Tensor.numel):
        if _free.pop(tensor.data_ptr(), None) is not None:
            return tensor
    return torch.empty(size, dtype=torch.float32)


def _give(tensor: Tensor) -> None:
    if not 0 < tensor.nbytes <= MOST_BYTES:
        return
    _free[tensor.data_ptr()] = tensor
    while sum(ready.nbytes for ready in _ready()) > MOST_BYTES:
        with suppress(KeyError):  # others gave back and took meanwhile
            _free.popitem(last=False)


def _ready() -> list[Tensor]:
    while True:
        with suppress(RuntimeError):  # the dictionary changed on the way
            return list(_free.values())
