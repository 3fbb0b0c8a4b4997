"""Training metrics, summed on the device and read every k steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trm_kernels import arguments
from trm_kernels.host_reads import HostReads


@dataclass(frozen=True)
class MetricWindow:
    """Means of metrics over a window of steps.

    Attributes:
        step: Number of the last step in the window, counted from 1.
        steps: Number of steps in the window.
        values: Mean of each metric.
    """

    step: int
    steps: int
    values: dict[str, float]


class MetricBuffer:
    """Sums of metrics in one float32 device tensor, which :meth:`add` updates in place.

    Args:
        read_every: Number of steps in a window.
    """

    def __init__(self, read_every: int = 10) -> None:
        arguments.integer("read_every", read_every, 1)
        self.read_every = read_every
        self.names: tuple[str, ...] = ()
        self._sums: Tensor | None = None
        self._reads = HostReads()
        self._step = self._pending = 0

    @torch.no_grad()
    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Add the metrics of one step, one-element tensors. After the first call, a graph can capture this.

        Raises:
            ValueError: If the names differ from those of the first call.
        """
        if self._sums is None:
            self.names = tuple(metrics)
            self._sums = torch.zeros(len(metrics), device=next(iter(metrics.values())).device)
        if tuple(metrics) != self.names:
            raise ValueError(f"metrics must be {list(self.names)} on every step, got {list(metrics)}")
        self._sums.add_(torch.stack([value.detach().reshape(()).float() for value in metrics.values()]))

    def count_step(self) -> None:
        """Count a finished step. Every ``read_every`` steps, start a read and a new window."""
        self._step += 1
        self._pending += 1
        if self._pending == self.read_every:
            self._read()

    def poll(self) -> list[MetricWindow]:
        """Return the windows that have reached the host since the last call; never waits for the device."""
        return [self._window(*found) for found in self._reads.poll()]

    def drain(self) -> list[MetricWindow]:
        """Return all remaining windows, including an incomplete last one; waits for the device."""
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
