"""The picture of a sweep. Needs matplotlib: ``pip install "llm-trm[plot]"``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llm_trm.files import replacing

if TYPE_CHECKING:
    from llm_trm.train.phase1_config import StageResult


def plot_sweep(results: Sequence[StageResult], path: Path) -> None:
    """Draw cosine similarity against D', learned and PCA, to the PNG file ``path``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ordered = sorted(results, key=lambda result: result.size)
    widths = [result.size for result in ordered]
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    try:
        bound = [result.reference.cosine_similarity for result in ordered]
        learned = [result.learned.cosine_similarity for result in ordered]
        axis.plot(widths, bound, marker="s", markersize=5, color="#7f8fa6", linestyle="--", label="PCA")
        axis.plot(widths, learned, marker="o", markersize=4, color="#2e7d22", label="learned")
        axis.set_xscale("log", base=2)
        axis.set_xticks(widths, [str(width) for width in widths])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.set_xlabel("compressed width D'")
        axis.set_ylabel("cosine similarity, held-out states")
        axis.legend()
        with replacing(path) as temporary:
            # No version in the file: the same results give the same bytes.
            figure.savefig(temporary, dpi=150, format="png", metadata={"Software": None})
    finally:
        plt.close(figure)
