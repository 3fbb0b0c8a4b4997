"""Figures of runs, with matplotlib: ``pip install "llm-trm[plot]"``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llm_trm.files import replacing

#: The figure that a run leaves in its folder.
CURVES_FILE = "curves.png"

#: Colours of training data, held-out data, and everything else.
TRAIN, HELD_OUT, OTHER = "#7f8fa6", "#2e7d22", "#e1b12c"


@contextmanager
def drawn(
    path: Path,
    rows: int = 1,
    columns: int = 1,
    *,
    size: tuple[float, float],
    xlabel: str,
    dpi: int = 120,
) -> Iterator[list[Any]]:
    """Axes to draw on, row by row; the PNG file ``path`` is written if the block ends without an error.

    Args:
        size: Size of the figure in inches.
        xlabel: Label of every x axis.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    try:
        for axis in axes.flat:
            axis.set_xlabel(xlabel)
            axis.grid(alpha=0.3)
        yield list(axes.flat)
        with replacing(path) as temporary:
            # Without the version of matplotlib, the same results give the same bytes.
            figure.savefig(temporary, dpi=dpi, format="png", metadata={"Software": None})
    finally:
        plt.close(figure)
