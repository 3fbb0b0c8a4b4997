"""A pool of reusable buffers for the ``native`` backend.

The buffers of a recursion take megabytes. malloc returns allocations of that size to the system, which zeroes
each new page: 5% of the time of a training step at width 256 (perf, two cores).
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from contextlib import suppress
from weakref import finalize

import torch
from torch import Tensor

#: Maximum bytes of free buffers; the oldest are released first.
MAX_BYTES = 1 << 30

# By address, most recently returned last. Without a lock, because the garbage collector may return buffers at
# any time, even inside these functions and between two steps of an iteration.
_free: OrderedDict[int, Tensor] = OrderedDict()


def take(size: int) -> Tensor:
    """Return an uninitialised float32 buffer of at least ``size`` elements from the pool.

    Its memory returns to the pool when nothing refers to it. The lifetime of the returned tensor does not
    show that, because saved-tensor hooks and views keep the memory alive through other tensors. The storage
    therefore owns a ctypes object, whose finalizer returns the memory.
    """
    buffer = _find(max(1, size))
    owner = (ctypes.c_float * buffer.numel()).from_address(buffer.data_ptr())
    finalize(owner, _give_back, buffer).atexit = False
    # Tensors created in inference mode cannot be used outside it.
    with torch.inference_mode(False):
        return torch.frombuffer(owner, dtype=torch.float32)


def release() -> None:
    """Return all free buffers to the system."""
    _free.clear()


def _find(size: int) -> Tensor:
    """Return a free buffer of ``size`` to ``2 * size`` elements, or allocate one."""
    fitting = [tensor for tensor in _free_buffers() if size <= tensor.numel() <= 2 * size]
    for tensor in sorted(fitting, key=Tensor.numel):
        if _free.pop(tensor.data_ptr(), None) is not None:
            return tensor
    return torch.empty(size, dtype=torch.float32)


def _give_back(tensor: Tensor) -> None:
    if not 0 < tensor.nbytes <= MAX_BYTES:
        return
    _free[tensor.data_ptr()] = tensor
    while sum(free.nbytes for free in _free_buffers()) > MAX_BYTES:
        with suppress(KeyError):  # another thread emptied the pool
            _free.popitem(last=False)


def _free_buffers() -> list[Tensor]:
    while True:
        with suppress(RuntimeError):  # the dictionary changed during iteration
            return list(_free.values())
