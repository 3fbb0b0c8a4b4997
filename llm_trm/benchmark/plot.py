"""Plots results as bars, or as curves over shapes. Needs matplotlib: ``pip install "llm-trm[plot]"``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llm_trm.benchmark.results import CaseResult
from llm_trm.benchmark.suites import Axis, scaling_axes
from llm_trm.benchmark.table import number
from llm_trm.files import replacing

_COLOURS = {
    "original": "#b0b0b0",
    "eager": "#7f8fa6",
    "eager+graph": "#5f6f86",
    "compile": "#e1b12c",
    "compile+graph": "#b8860b",
    "triton": "#44bd32",
    "triton+graph": "#2e7d22",
    "native": "#0097e6",
    "packed": "#8e6bbf",
    "freezing": "#c8a165",
    "official": "#b39ddb",
    "official+compile": "#7e57c2",
    "liger": "#ef6c00",
    "tiny-recursive-model": "#c2185b",
}


def plot(results: Sequence[CaseResult], path: Path) -> None:
    """Plot the timed rows of every case: median milliseconds as bars, p20 to p80 as whiskers."""
    timed = [result for result in results if any(row.median_ms for row in result.rows)]
    heights = [0.8 + 0.3 * len(result.rows) for result in timed] or [1.0]
    with figure(
        path,
        len(heights),
        1,
        figsize=(8, sum(heights)),
        squeeze=False,
        gridspec_kw={"height_ratios": heights},
    ) as axes:
        if not timed:
            show_empty(axes[0][0])
        for axis, result in zip(axes[:, 0], timed, strict=False):
            _panel(axis, result)


def plot_scaling(results: Sequence[CaseResult], path: Path) -> None:
    """Plot time against batch size, sequence length and hidden size, log-log, one line per candidate.

    Uses only results on an axis of the scaling suite (:func:`~.suites.scaling_axes`). The dotted line is the
    limit measured in the same run.
    """
    axes_of_suite = max(
        (scaling_axes(cpu) for cpu in (False, True)), key=lambda axes: len(_points(axes, results))
    )
    with figure(path, 1, len(axes_of_suite), figsize=(12, 4), sharey=True) as axes:
        for drawn, axis in zip(axes, axes_of_suite, strict=True):
            _curves(drawn, axis, results)
        axes[0].set_ylabel("ms per latent recursion", fontsize=8)
        handles, labels = axes[0].get_legend_handles_labels()
        if labels:
            axes[0].legend(handles, labels, fontsize=7)


def _points(axes: Sequence[Axis], results: Sequence[CaseResult]) -> list[CaseResult]:
    return [result for result in results if any(axis.value(result.case) is not None for axis in axes)]


@contextmanager
def figure(path: Path, *shape: int, **options: Any) -> Iterator[Any]:
    """Yield the axes of ``plt.subplots(*shape, **options)``, and save the figure to ``path`` afterwards."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing, axes = plt.subplots(*shape, layout="constrained", **options)
    try:
        yield axes
        # Omit the version from the file, so that equal results give equal bytes.
        metadata = {"Software": None} if path.suffix.lower() == ".png" else None
        with replacing(path) as temporary:
            drawing.savefig(temporary, dpi=150, metadata=metadata)
    finally:
        plt.close(drawing)


def show_empty(axis: Any) -> None:
    """Show on an axis that there is nothing to plot."""
    axis.set_axis_off()
    axis.text(0.5, 0.5, "nothing was timed", ha="center")


def _curves(drawn: Any, axis: Axis, results: Sequence[CaseResult]) -> None:
    points = sorted(
        ((value, result) for result in results if (value := axis.value(result.case)) is not None),
        key=lambda point: point[0],
    )
    timed = [(value, result) for value, result in points if any(row.median_ms for row in result.rows)]
    if not timed:
        show_empty(drawn)
        return
    names = dict.fromkeys(row.backend for _, result in timed for row in result.rows if row.median_ms)
    for name in names:
        curve = [
            (value, row.median_ms)
            for value, result in timed
            for row in result.rows
            if row.backend == name and row.median_ms
        ]
        drawn.plot(*zip(*curve, strict=True), marker="o", markersize=3, color=colour(name), label=name)
    floors = [(value, result.floor_ms) for value, result in timed]
    drawn.plot(*zip(*floors, strict=True), color="black", linestyle=":", linewidth=1, label="limit")
    drawn.set_xscale("log", base=2)
    drawn.set_yscale("log")
    drawn.set_xticks([value for value, _ in timed], [str(value) for value, _ in timed])
    drawn.minorticks_off()
    drawn.grid(alpha=0.3)
    drawn.tick_params(labelsize=8)
    base = axis.base
    fixed = {
        "batch": f"B {base.batch}",
        "latents": f"L {base.latents}",
        "hidden_size": f"D {base.hidden_size}",
    }
    others = ", ".join(text for field, text in fixed.items() if field != axis.field)
    drawn.set_xlabel(f"{axis.label} ({others})", fontsize=8)
    drawn.set_title(f"{timed[0][1].device}, {timed[0][1].case.dtype}", fontsize=8, loc="left")


def colour(name: str) -> str:
    """The colour of a candidate, the same in every plot."""
    return _COLOURS.get(name, "#888888")


def _panel(axis: Any, result: CaseResult) -> None:
    rows = [row for row in result.rows if row.median_ms is not None][::-1]
    medians = [row.median_ms or 0.0 for row in rows]
    whiskers = [
        [(row.median_ms or 0.0) - (row.p20_ms or 0.0) for row in rows],
        [(row.p80_ms or 0.0) - (row.median_ms or 0.0) for row in rows],
    ]
    colours = [colour(row.backend) for row in rows]
    axis.barh([row.backend for row in rows], medians, xerr=whiskers, color=colours, ecolor="#333333")
    axis.axvline(result.floor_ms, color="black", linestyle=":", linewidth=1)
    axis.bar_label(axis.containers[-1], labels=[f" {number(median)} ms" for median in medians], fontsize=8)
    axis.margins(x=0.15)
    axis.set_xlabel("ms per call (dotted: the limit measured in the same run)", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.set_title(f"{result.key}, {result.device}", fontsize=9, loc="left")
