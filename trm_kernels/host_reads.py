"""Asynchronous reads of small device tensors on the host."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class _Copy:
    tag: Any
    values: Tensor
    event: torch.cuda.Event | None

    def arrived(self) -> bool:
        return self.event is None or self.event.query()

    def wait(self) -> Tensor:
        if self.event is not None:
            self.event.synchronize()
        return self.values


class HostReads:
    """A queue of copies of device tensors to the host, in push order.

    On CUDA a push enqueues a copy to pinned memory and an event. On other devices it copies immediately.
    """

    def __init__(self) -> None:
        self._copies: deque[_Copy] = deque()

    def __len__(self) -> int:
        return len(self._copies)

    def push(self, tensor: Tensor, tag: Any = None) -> None:
        """Copy ``tensor`` at this point of the current stream. ``tag`` is returned with the copy."""
        if tensor.device.type != "cuda":
            self._copies.append(_Copy(tag, tensor.detach().to("cpu", copy=True), None))
            return
        values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        values.copy_(tensor.detach(), non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(tensor.device))
        self._copies.append(_Copy(tag, values, event))

    def poll(self) -> list[tuple[Any, Tensor]]:
        """Return the (tag, values) pairs that have arrived since the last call; never waits."""
        found = []
        while self._copies and self._copies[0].arrived():
            copy = self._copies.popleft()
            found.append((copy.tag, copy.values))
        return found

    def take(self) -> tuple[Any, Tensor]:
        """Return the oldest (tag, values); waits for that copy only, not for work enqueued after it."""
        copy = self._copies.popleft()
        return copy.tag, copy.wait()

    def drain(self) -> list[tuple[Any, Tensor]]:
        """Return all remaining pairs; waits for the last one."""
        return [self.take() for _ in range(len(self._copies))]
