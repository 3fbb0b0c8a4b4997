"""Results as bars: one panel a case. Needs matplotlib, which ``pip install "llm-trm[plot]"`` brings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llm_trm.benchmark.results import CaseResult
from llm_trm.benchmark.table import number

_COLOURS = {
    "original": "#b0b0b0",
    "eager": "#7f8fa6",
    "eager+graph": "#5f6f86",
    "compile": "#e1b12c",
    "compile+graph": "#b8860b",
    "triton": "#44bd32",
    "triton+graph": "#2e7d22",
    "native": "#0097e6",
}


def plot(results: Sequence[CaseResult], path: Path) -> None:
    """Draw the timed rows of every case: median milliseconds as bars, p20 to p80 as whiskers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = [result for result in results if result.baselines() or any(row.median_ms for row in result.rows)]
    heights = [0.8 + 0.3 * len(result.rows) for result in timed] or [1.0]
    figure, axes = plt.subplots(
        len(heights),
        1,
        figsize=(8, sum(heights)),
        squeeze=False,
        gridspec_kw={"height_ratios": heights},
        layout="constrained",
    )
    if not timed:
        axes[0][0].set_axis_off()
        axes[0][0].text(0.5, 0.5, "nothing was timed", ha="center")
    for axis, result in zip(axes[:, 0], timed, strict=False):
        _panel(axis, result)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _panel(axis, result: CaseResult) -> None:  # type: ignore[no-untyped-def]
    rows = [row for row in result.rows if row.median_ms is not None][::-1]
    medians = [row.median_ms or 0.0 for row in rows]
    whiskers = [
        [(row.median_ms or 0.0) - (row.p20_ms or 0.0) for row in rows],
        [(row.p80_ms or 0.0) - (row.median_ms or 0.0) for row in rows],
    ]
    colours = [_COLOURS.get(row.backend, "#888888") for row in rows]
    axis.barh([row.backend for row in rows], medians, xerr=whiskers, color=colours, ecolor="#333333")
    axis.axvline(result.floor_ms, color="black", linestyle=":", linewidth=1)
    axis.bar_label(axis.containers[-1], labels=[f" {number(median)} ms" for median in medians], fontsize=8)
    axis.margins(x=0.15)
    axis.set_xlabel("ms a call (dotted: the limit measured in the same run)", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.set_title(f"{result.case.name}, {result.device}", fontsize=9, loc="left")
