"""The curves of a puzzle run, with matplotlib: ``pip install "llm-trm[plot]"``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_trm.train.run.figure import HELD_OUT, TRAIN, drawn


def plot_curves(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot accuracy and loss by training time to the PNG file ``path``.

    Args:
        history: Records of :class:`~llm_trm.train.puzzle.report.PuzzleResult`, at least one.
    """
    minutes = [record["seconds"] / 60 for record in history]
    with drawn(path, 1, 2, size=(9, 3.6), xlabel="minutes of training") as (accuracy, loss):
        accuracy.plot(
            minutes,
            [record["train"]["exact"] for record in history],
            color=TRAIN,
            label="training, samples in flight",
        )
        tested = [(at, record["test"]) for at, record in zip(minutes, history, strict=True) if record["test"]]
        if tested:
            accuracy.plot(
                [at for at, _ in tested],
                [test["exact"] for _, test in tested],
                color=HELD_OUT,
                marker="o",
                markersize=4,
                label="test puzzles",
            )
        accuracy.set_ylim(0, 1.02)
        accuracy.set_ylabel("fraction of puzzles without a wrong cell")
        accuracy.legend(fontsize=8)
        loss.plot(minutes, [record["train"]["loss"] for record in history], color=TRAIN)
        loss.set_yscale("log")
        loss.set_ylabel("loss, training")
