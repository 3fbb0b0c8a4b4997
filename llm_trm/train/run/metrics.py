"""Sums of the metrics of a run's training steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from trm_kernels.metrics import MetricWindow


class RunMetrics:
    """Adds up the metrics of a :class:`~trm_kernels.TrainingStep` between two evaluations.

    Attributes:
        sums: Sum of each metric over ``steps`` updates.
        steps: Number of updates that count: those with finite metrics.
        skipped: Number of updates of the whole run that were skipped since a gradient was not finite.
    """

    def __init__(self) -> None:
        self.skipped = 0.0
        self.clear()

    def clear(self) -> None:
        """Start again from zero, after an evaluation."""
        self.sums: dict[str, float] = {}
        self.steps = 0.0

    def add(self, windows: Sequence[MetricWindow]) -> list[Mapping[str, float]]:
        """Add windows of metrics that have arrived; returns the finite ones."""
        finite: list[Mapping[str, float]] = []
        for window in windows:
            self.skipped += window.values.get("skipped", 0.0) * window.steps
            if not all(map(math.isfinite, window.values.values())):
                continue  # one update that was skipped should not cost the whole epoch
            for name, value in window.values.items():
                self.sums[name] = self.sums.get(name, 0.0) + value * window.steps
            self.steps += window.steps
            finite.append(window.values)
        return finite

    def means(self) -> dict[str, float]:
        """The mean of each metric."""
        return {name: value / self.steps for name, value in self.sums.items()}
