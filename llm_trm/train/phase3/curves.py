"""The picture of a run of phase 3. Needs matplotlib: ``pip install "llm-trm[plot]"``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_trm.train.run.figure import HELD_OUT, OTHER, TRAIN, drawn


def plot_curves(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw rewards, held-out accuracy and divergence against the step, to the PNG file ``path``.

    Args:
        history: Records of :class:`~llm_trm.train.phase3.report.Phase3Result`, at least one.
    """
    trained = [record for record in history if "reward" in record]
    tested = [record for record in history if "eval_accuracy" in record]
    steps = [record["step"] for record in trained]
    with drawn(path, 1, 2, size=(9, 3.6), xlabel="optimizer step") as (accuracy, divergence):
        for name, color in (("correctness", TRAIN), ("format", OTHER)):
            means = [record[f"rewards/{name}/mean"] for record in trained]
            accuracy.plot(steps, means, color=color, label=f"{name}, sampled in training")
        accuracy.plot(
            [record["step"] for record in tested],
            [record["eval_accuracy"] for record in tested],
            color=HELD_OUT,
            marker="o",
            markersize=4,
            label="held-out problems, greedy",
        )
        accuracy.set_ylim(0, 1.02)
        accuracy.set_ylabel("fraction of answers")
        accuracy.legend(fontsize=8)
        for name, color in (("kl", TRAIN), ("entropy", OTHER)):
            known = [(record["step"], record[name]) for record in trained if name in record]
            if known:
                divergence.plot(*zip(*known, strict=True), color=color, label=name)
        divergence.set_ylabel("nats per token")
        divergence.legend(fontsize=8)
