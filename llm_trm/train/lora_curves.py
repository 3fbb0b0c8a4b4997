"""The picture of a run of ``llm-trm train lora``. Needs matplotlib: ``pip install "llm-trm[plot]"``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_trm.files import replacing

_TRAIN, _HELD_OUT, _THINK = "#7f8fa6", "#2e7d22", "#e1b12c"


def plot_curves(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw loss, right answers and written ``<think>`` against the update, to the PNG file ``path``.

    Args:
        history: Of a :class:`~llm_trm.train.lora.LoraResult`, with at least one evaluation.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def values(name: str) -> tuple[list[float], list[float]]:
        found = [entry for entry in history if name in entry]
        return [entry["step"] for entry in found], [entry[name] for entry in found]

    figure, (loss, shares) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    try:
        loss.plot(*values("loss"), color=_TRAIN, label="training, with the halting head's")
        loss.plot(*values("eval_loss"), color=_HELD_OUT, label="held out")
        loss.plot(*values("eval_think_loss"), color=_THINK, linestyle="--", label="held out, <think> alone")
        loss.set_ylabel("loss a token")
        shares.plot(*values("eval_answer_accuracy"), color=_HELD_OUT, label="answers right, token by token")
        shares.plot(*values("eval_think_rate"), color=_THINK, label="<think> written where it is wanted")
        shares.set_ylabel("share of what is held out")
        shares.set_ylim(-0.02, 1.02)
        for axis in (loss, shares):
            axis.set_xlabel("update")
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=120, format="png")
    finally:
        plt.close(figure)
