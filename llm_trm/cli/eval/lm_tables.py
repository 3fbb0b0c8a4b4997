"""The results of ``llm-trm eval lm`` as tables and text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from llm_trm.cli.tables import new_table, with_interval
from llm_trm.evaluate.decoding import Mode

if TYPE_CHECKING:
    from rich.table import Table

    from llm_trm.evaluate.language_model import LanguageModelEvaluation, ModeScores


def mode_table(modes: Mapping[Mode, ModeScores], title: str) -> Table:
    """One row per mode."""
    from rich.markup import escape

    times = "time per problem [p20, p80]"
    table = new_table(
        title, "mode", ["exact match [95%]", "tokens", times, "TRM steps", "soft tokens", "cut"]
    )
    for mode, scores in modes.items():
        latent = mode == "latent"
        table.add_row(
            mode,
            with_interval(scores.accuracy, scores.interval),
            f"{scores.tokens:.1f}",
            escape(_time(scores)),
            f"{scores.steps:.2f}" if latent else "-",
            f"{scores.soft_tokens:.1f}" if latent else "-",
            f"{scores.cut:.1%}",
        )
    return table


def group_table(found: LanguageModelEvaluation) -> Table:
    """One row per group of problems."""
    from rich.markup import escape

    headers = ["problems", *(header for mode in found.modes for header in (f"{mode} [95%]", "tokens"))]
    if "latent" in found.modes:
        headers.append("TRM steps")
    table = new_table(f"by {found.by}", str(found.by), headers)
    for label, modes in found.groups.items():
        cells = [
            cell
            for scores in modes.values()
            for cell in (with_interval(scores.accuracy, scores.interval), f"{scores.tokens:.1f}")
        ]
        if "latent" in modes:
            cells.append(f"{modes['latent'].steps:.2f}")
        table.add_row(escape(label), str(next(iter(modes.values())).problems), *cells)
    return table


def remarks(found: LanguageModelEvaluation, limit: int, plain: str | None) -> list[str]:
    """How the recursion compares, and what the columns mean."""
    lines = []
    ratios = found.ratios
    if ratios is not None:
        if ratios.gap_closed is None:
            lines.append("Thinking gains nothing over answering immediately here: there is no gap to close.")
        else:
            interval = ratios.gap_closed_interval
            bounds = "" if interval is None else f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
            lines.append(
                f"latent closes {ratios.gap_closed:.1%}{bounds} of the gap between no-think and think."
            )
        lines.append(
            f"It uses {ratios.tokens:.1%} of the tokens of thinking, and {ratios.seconds:.1%} of the time."
        )
    latent = found.modes.get("latent")
    if latent is not None and latent.thoughts < 1:
        lines.append(
            f"The model recurs {latent.thoughts:.2f} times per problem: it does not always write <think>."
        )
    if any(scores.cut for scores in found.modes.values()):
        lines.append(
            f"cut: answers that did not end within {limit} tokens (--max-new-tokens); they count as wrong."
        )
    if plain is not None:
        lines.append(f"no-think and think use the model {plain}.")
    return lines


def _time(scores: ModeScores) -> str:
    if scores.seconds is None or scores.spread is None:
        return "-"
    factor, unit = (1000.0, "ms") if scores.seconds < 1 else (1.0, "s")
    low, high = scores.spread
    return f"{factor * scores.seconds:.2f} {unit} [{factor * low:.2f}, {factor * high:.2f}]"
