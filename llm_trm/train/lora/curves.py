"""The picture of a run of ``llm-trm train lora``. Needs matplotlib: ``pip install "llm-trm[plot]"``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_trm.train.run.figure import HELD_OUT, OTHER, TRAIN, drawn


def plot_curves(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw loss, right answers and written ``<think>`` against the update, to the PNG file ``path``.

    Args:
        history: History of a :class:`~llm_trm.train.lora.report.LoraResult`, with at least one evaluation.
    """

    def values(name: str) -> tuple[list[float], list[float]]:
        found = [entry for entry in history if name in entry]
        return [entry["step"] for entry in found], [entry[name] for entry in found]

    with drawn(path, 1, 2, size=(9, 3.5), xlabel="update") as (loss, shares):
        loss.plot(*values("loss"), color=TRAIN, label="training, with the halting head's")
        loss.plot(*values("eval_loss"), color=HELD_OUT, label="held out")
        loss.plot(*values("eval_think_loss"), color=OTHER, linestyle="--", label="held out, <think> alone")
        loss.set_ylabel("loss per token")
        shares.plot(*values("eval_answer_accuracy"), color=HELD_OUT, label="answers right, token by token")
        shares.plot(*values("eval_think_rate"), color=OTHER, label="<think> written where it is wanted")
        shares.set_ylabel("fraction of held-out questions")
        shares.set_ylim(-0.02, 1.02)
        for axis in (loss, shares):
            axis.legend(fontsize=8)
