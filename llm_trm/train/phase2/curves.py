"""The curves of a phase 2 run, with matplotlib: ``pip install "llm-trm[plot]"``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_trm.train.run.figure import HELD_OUT, OTHER, TRAIN, drawn


def plot_curves(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot error, cosine similarity, halting and learning rate by epoch to the PNG file ``path``.

    Args:
        history: Records of :class:`~llm_trm.train.phase2.report.Phase2Result`, at least one.
    """
    epochs = [record["epoch"] for record in history]

    def values(part: str, name: str) -> list[float]:
        return [record[part][name] for record in history]

    with drawn(path, 2, 2, size=(9, 6), xlabel="epoch") as (error, cosine, halting, rate):
        for axis, name in ((error, "mse"), (cosine, "cosine")):
            axis.plot(epochs, values("train", name), color=TRAIN, label="training, all steps")
            axis.plot(epochs, values("validation", name), color=HELD_OUT, label="held out, last step")
            axis.plot(
                epochs,
                values("validation", f"halted_{name}"),
                color=OTHER,
                linestyle="--",
                label="held out, where it halts",
            )
            axis.legend(fontsize=8)
        error.set_yscale("log")
        error.set_ylabel("mean squared error")
        cosine.set_ylabel("cosine similarity")
        halting.plot(epochs, values("train", "halt_probability"), color=TRAIN)
        halting.set_ylabel("halting probability, training", color=TRAIN)
        steps = halting.twinx()
        steps.plot(epochs, values("validation", "halt_steps"), color=OTHER)
        steps.set_ylabel("steps to halt, held out", color=OTHER)
        rate.plot(epochs, [record["learning_rate"] for record in history], color=TRAIN)
        rate.set_ylabel("learning rate, end of epoch")
