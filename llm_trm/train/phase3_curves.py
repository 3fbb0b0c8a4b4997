"""The picture of a run of phase 3. Needs matplotlib: ``pip install "llm-trm[plot]"``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_trm.files import replacing

_TRAIN, _HELD_OUT, _OTHER = "#7f8fa6", "#2e7d22", "#e1b12c"


def plot_curves(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw rewards, held-out accuracy and divergence against the step, to the PNG file ``path``.

    Args:
        history: Records of :class:`~llm_trm.train.phase3_config.Phase3Result`, at least one.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    trained = [record for record in history if "reward" in record]
    tested = [record for record in history if "eval_accuracy" in record]
    steps = [record["step"] for record in trained]
    figure, (accuracy, divergence) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    try:
        for name, color in (("correctness", _TRAIN), ("format", _OTHER)):
            means = [record[f"rewards/{name}/mean"] for record in trained]
            accuracy.plot(steps, means, color=color, label=f"{name}, sampled in training")
        accuracy.plot(
            [record["step"] for record in tested],
            [record["eval_accuracy"] for record in tested],
            color=_HELD_OUT,
            marker="o",
            markersize=4,
            label="held-out problems, greedy",
        )
        accuracy.set_ylim(0, 1.02)
        accuracy.set_ylabel("share of answers")
        accuracy.legend(fontsize=8)
        for name, color in (("kl", _TRAIN), ("entropy", _OTHER)):
            known = [(record["step"], record[name]) for record in trained if name in record]
            if known:
                divergence.plot(*zip(*known, strict=True), color=color, label=name)
        divergence.set_ylabel("nats a token")
        divergence.legend(fontsize=8)
        for axis in (accuracy, divergence):
            axis.set_xlabel("optimizer step")
            axis.grid(alpha=0.3)
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=120, format="png")
    finally:
        plt.close(figure)
