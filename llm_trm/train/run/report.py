"""What a training reports, and the interface that receives it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run is about to do.

    Attributes:
        steps: Steps of the whole run; one is what :meth:`Report.step` counts.
        start: Steps that a resumed run has done.
    """

    steps: int
    start: int


class Report:
    """Follows a training run; this one is silent. Only the main process calls it."""

    def begin(self, plan: Any) -> None:
        """Training starts, or continues, as a :class:`Plan` describes."""

    def step(self, step: int) -> None:
        """Step ``step``, counted from 1, is done."""

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """New metrics of training, up to ``step``."""

    def evaluated(self, record: Mapping[str, Any]) -> None:
        """The model was evaluated; the record is part of the run's history."""
