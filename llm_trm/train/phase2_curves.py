"""The picture of a run of phase 2. Needs matplotlib: ``pip install "llm-trm[plot]"``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_trm.files import replacing

_TRAIN, _HELD_OUT, _HALTED = "#7f8fa6", "#2e7d22", "#e1b12c"


def plot_curves(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw error, cosine similarity, halting and learning rate against the epoch, to the PNG file ``path``.

    Args:
        history: Records of :class:`~llm_trm.train.phase2_report.Phase2Result`, at least one.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    epochs = [record["epoch"] for record in history]

    def values(part: str, name: str) -> list[float]:
        return [record[part][name] for record in history]

    figure, ((error, cosine), (halting, rate)) = plt.subplots(2, 2, figsize=(9, 6), layout="constrained")
    try:
        for axis, name in ((error, "mse"), (cosine, "cosine")):
            axis.plot(epochs, values("train", name), color=_TRAIN, label="training, all steps")
            axis.plot(epochs, values("validation", name), color=_HELD_OUT, label="held out, last step")
            axis.plot(
                epochs,
                values("validation", f"halted_{name}"),
                color=_HALTED,
                linestyle="--",
                label="held out, where it halts",
            )
            axis.legend(fontsize=8)
        error.set_yscale("log")
        error.set_ylabel("mean squared error")
        cosine.set_ylabel("cosine similarity")
        halting.plot(epochs, values("train", "halt_probability"), color=_TRAIN)
        halting.set_ylabel("halting probability, training", color=_TRAIN)
        steps = halting.twinx()
        steps.plot(epochs, values("validation", "halt_steps"), color=_HALTED)
        steps.set_ylabel("steps to halt, held out", color=_HALTED)
        rate.plot(epochs, [record["learning_rate"] for record in history], color=_TRAIN)
        rate.set_ylabel("learning rate, end of epoch")
        for axis in (error, cosine, halting, rate):
            axis.set_xlabel("epoch")
            axis.grid(alpha=0.3)
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=120, format="png")
    finally:
        plt.close(figure)
