"""The figure of a sweep, with matplotlib: ``pip install "llm-trm[plot]"``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llm_trm.train.run.figure import HELD_OUT, TRAIN, drawn

if TYPE_CHECKING:
    from llm_trm.train.phase1.report import StageResult


def plot_sweep(results: Sequence[StageResult], path: Path) -> None:
    """Plot cosine similarity by D', learned and PCA, to the PNG file ``path``."""
    ordered = sorted(results, key=lambda result: result.size)
    widths = [result.size for result in ordered]
    with drawn(path, size=(6, 4), xlabel="compressed width D'", dpi=150) as (axis,):
        bound = [result.reference.cosine_similarity for result in ordered]
        learned = [result.learned.cosine_similarity for result in ordered]
        axis.plot(widths, bound, marker="s", markersize=5, color=TRAIN, linestyle="--", label="PCA")
        axis.plot(widths, learned, marker="o", markersize=4, color=HELD_OUT, label="learned")
        axis.set_xscale("log", base=2)
        axis.set_xticks(widths, [str(width) for width in widths])
        axis.minorticks_off()
        axis.set_ylabel("cosine similarity, held-out states")
        axis.legend()
