"""The picture of a puzzle run. Needs matplotlib: ``pip install "llm-trm[plot]"``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_trm.files import replacing

_TRAIN, _TEST = "#7f8fa6", "#2e7d22"


def plot_curves(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw accuracy against training time, and the loss, to the PNG file ``path``.

    Args:
        history: Records of :class:`~llm_trm.train.puzzle_report.PuzzleResult`, at least one.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    minutes = [record["seconds"] / 60 for record in history]
    figure, (accuracy, loss) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    try:
        accuracy.plot(
            minutes,
            [record["train"]["exact"] for record in history],
            color=_TRAIN,
            label="training, samples in flight",
        )
        tested = [(at, record["test"]) for at, record in zip(minutes, history, strict=True) if record["test"]]
        if tested:
            accuracy.plot(
                [at for at, _ in tested],
                [test["exact"] for _, test in tested],
                color=_TEST,
                marker="o",
                markersize=4,
                label="test puzzles",
            )
        accuracy.set_ylim(0, 1.02)
        accuracy.set_ylabel("share of puzzles without a wrong cell")
        accuracy.legend(fontsize=8)
        loss.plot(minutes, [record["train"]["loss"] for record in history], color=_TRAIN)
        loss.set_yscale("log")
        loss.set_ylabel("loss, training")
        for axis in (accuracy, loss):
            axis.set_xlabel("minutes of training")
            axis.grid(alpha=0.3)
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=120, format="png")
    finally:
        plt.close(figure)
