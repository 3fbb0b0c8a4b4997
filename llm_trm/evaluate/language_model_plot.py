"""Plots accuracy against time, one point per mode. Needs matplotlib: ``pip install "llm-trm[plot]"``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from textwrap import fill

from llm_trm.evaluate.decoding import Mode
from llm_trm.evaluate.language_model import ModeScores
from llm_trm.files import replacing

_COLOURS: dict[Mode, str] = {"no-think": "#7f8fa6", "think": "#e1b12c", "latent": "#2e7d22"}
#: Ratio of times above which the axis is logarithmic.
_WIDE = 20
#: Characters per line of the title.
_TITLE_WIDTH = 80


def plot_modes(modes: Mapping[Mode, ModeScores], path: Path, title: str = "") -> None:
    """Plot accuracy with 95% intervals against the wall time per problem with its range from p20 to p80."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    try:
        times = []
        for mode, scores in modes.items():
            low, high = scores.interval
            milliseconds = 1000 * (scores.seconds or 0.0)
            fast, slow = (1000 * bound for bound in scores.spread or (0.0, 0.0))
            times.append(milliseconds)
            axis.errorbar(
                milliseconds,
                100 * scores.accuracy,
                # A mean may be outside the range between two percentiles.
                xerr=[[max(milliseconds - fast, 0.0)], [max(slow - milliseconds, 0.0)]],
                # Rounding may put a fraction slightly outside its interval.
                yerr=[
                    [max(100 * (scores.accuracy - low), 0.0)],
                    [max(100 * (high - scores.accuracy), 0.0)],
                ],
                fmt="o",
                capsize=4,
                color=_COLOURS[mode],
                label=f"{mode}, {scores.tokens:.1f} tokens",
            )
        if max(times) > _WIDE * min(times) > 0:
            axis.set_xscale("log")
        else:
            axis.set_xlim(0, 1.15 * max(times))
        axis.set_ylim(-3, 103)
        axis.set_xlabel("wall time per problem, ms")
        axis.set_ylabel("exact match, %")
        axis.set_title(fill(title, _TITLE_WIDTH), fontsize=9)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=120, format=path.suffix[1:].lower())
    finally:
        plt.close(figure)
