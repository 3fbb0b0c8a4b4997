"""Small device tensors read on the host without making it wait for the device."""

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
    """Copies of device tensors on their way to the host, in the order in which they were pushed.

    On CUDA a push enqueues a copy to pinned memory and an event; on other devices the copy is made at once.
    """

    def __init__(self) -> None:
        self._copies: deque[_Copy] = deque()

    def __len__(self) -> int:
        return len(self._copies)

    def push(self, tensor: Tensor, tag: Any = None) -> None:
        """Copy ``tensor`` as it is at this point of the current stream; ``tag`` comes back with it."""
        if tensor.device.type != "cuda":
            self._copies.append(_Copy(tag, tensor.detach().to("cpu", copy=True), None))
            return
        values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        values.copy_(tensor.detach(), non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(tensor.device))
        self._copies.append(_Copy(tag, values, event))

    def poll(self) -> list[tuple[Any, Tensor]]:
        """The (tag, values) that have arrived since the last call; never waits."""
        found = []
        while self._copies and self._copies[0].arrived():
            copy = self._copies.popleft()
            found.append((copy.tag, copy.values))
        return found

    def take(self) -> tuple[Any, Tensor]:
        """The oldest (tag, values); waits for that copy alone, not for work enqueued after it."""
        copy = self._copies.popleft()
        return copy.tag, copy.wait()

    def drain(self) -> list[tuple[Any, Tensor]]:
        """All that are left; waits for the last."""
        return [self.take() for _ in range(len(self._copies))]
