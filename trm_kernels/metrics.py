"""Training metrics that are summed on the device and read every k steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trm_kernels import arguments
from trm_kernels.host_reads import HostReads


@dataclass(frozen=True)
class MetricWindow:
    """Means over some steps.

    Attributes:
        step: Number of the last step that they cover, counted from 1.
        steps: How many they cover.
        values: Mean of each metric.
    """

    step: int
    steps: int
    values: dict[str, float]


class MetricBuffer:
    """Sums of metrics in one float32 device tensor, which :meth:`add` changes in place.

    Args:
        read_every: Steps in a window.
    """

    def __init__(self, read_every: int = 10) -> None:
        arguments.whole("read_every", read_every, 1)
        self.read_every = read_every
        self.names: tuple[str, ...] = ()
        self._sums: Tensor | None = None
        self._reads = HostReads()
        self._step = self._pending = 0

    @torch.no_grad()
    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Add one step's metrics, tensors of one element; can be part of a graph after the first call.

        Raises:
            ValueError: Not the names of the first call.
        """
        if self._sums is None:
            self.names = tuple(metrics)
            self._sums = torch.zeros(len(metrics), device=next(iter(metrics.values())).device)
        if tuple(metrics) != self.names:
            raise ValueError(f"metrics must be {list(self.names)} on every step, got {list(metrics)}")
        self._sums.add_(torch.stack([value.detach().reshape(()).float() for value in metrics.values()]))

    def count_step(self) -> None:
        """Note that a step is over; every ``read_every`` steps, start a read and begin a new window."""
        self._step += 1
        self._pending += 1
        if self._pending == self.read_every:
            self._read()

    def poll(self) -> list[MetricWindow]:
        """The windows that have reached the host since the last call; never waits for the device."""
        return [self._window(*found) for found in self._reads.poll()]

    def drain(self) -> list[MetricWindow]:
        """All windows that are left, with an unfinished one at the end; waits for the device."""
        if self._pending:
            self._read()
        return [self._window(*found) for found in self._reads.drain()]

    def _read(self) -> None:
        assert self._sums is not None
        self._reads.push(self._sums, (self._step, self._pending))
        self._sums.zero_()
        self._pending = 0

    def _window(self, tag: tuple[int, int], sums: Tensor) -> MetricWindow:
        step, steps = tag
        means = (sums.double() / steps).tolist()
        return MetricWindow(step, steps, dict(zip(self.names, means, strict=True)))
