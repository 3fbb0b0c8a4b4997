"""Generates the results in docs/latent.md from ``latent.jsonl`` and ``latent_learning.jsonl``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.latent import LEARNING, RESULTS, STAGES
from bench.puzzle_report import latest
from llm_trm.benchmark.table import number

_MODES = ("no-think", "think", "latent")


def text(results: Path) -> str:
    """Results of direct answers, thinking and the recursion, one line per stage and seed, as Markdown."""
    lines = sorted(latest(results / RESULTS.name), key=lambda line: (line["seed"], stage_order(line)))
    if not lines:
        return "Not measured yet."
    parts = [_runs(lines), "By the number of operations:", _groups(lines)]
    learned = latest(results / LEARNING.name)
    if learned:
        parts += [
            "Accuracy on held-out questions during `train lora`, by starting point:",
            _learning(learned),
        ]
    return "\n\n".join(parts)


def stage_order(line: Mapping[str, Any]) -> int:
    """Index of a line's stage in STAGES."""
    return list(STAGES).index(line["stage"])


def _runs(lines: Sequence[Mapping[str, Any]]) -> str:
    head = ["seed", "after", "problems"]
    head += [f"{mode}: right (95% interval), tokens, ms" for mode in _MODES]
    head += ["gap closed", "tokens", "time", "steps"]
    rows = [head, ["---:", "---", *["---:"] * (len(head) - 2)]]
    for line in lines:
        modes, ratios = line["modes"], line["ratios"]
        cells = [str(line["seed"]), line["stage"], str(modes["latent"]["problems"])]
        for mode in _MODES:
            low, high = modes[mode]["interval"]
            cells.append(
                f"{modes[mode]['accuracy']:.1%} ({low:.1%} to {high:.1%}), {modes[mode]['tokens']:.1f}, "
                f"{number(1e3 * modes[mode]['seconds'])}"
            )
        cells += [f"{ratios['gap_closed']:.1%}", f"{ratios['tokens']:.1%}", f"{ratios['seconds']:.1%}"]
        rows.append([*cells, f"{modes['latent']['steps']:.2f}"])
    return _table(rows)


def _groups(lines: Sequence[Mapping[str, Any]]) -> str:
    last = [line for line in lines if line["stage"] == list(STAGES)[-1]]
    names = list(dict.fromkeys(name for line in last for name in line["groups"]))
    rows = [["operations", *(f"seed {line['seed']}: no-think, think, latent" for line in last)]]
    rows.append(["---"] + ["---:"] * len(last))
    for name in names:
        cells = []
        for line in last:
            group = line["groups"].get(name)
            cells.append(", ".join(f"{group[mode]['accuracy']:.1%}" for mode in _MODES) if group else "-")
        rows.append([name, *cells])
    return _table(rows)


def _learning(lines: Sequence[Mapping[str, Any]]) -> str:
    """One line per run and one column per evaluation."""
    steps = sorted({int(step) for line in lines for step in line["right"]})
    rows = [["starts from", "seed", *(f"after {step} updates" for step in steps)]]
    rows.append(["---", "---:"] + ["---:"] * len(steps))
    for line in lines:
        right = [line["right"].get(str(step)) for step in steps]
        accuracies = ["-" if accuracy is None else f"{accuracy:.1%}" for accuracy in right]
        rows.append([line["start"], str(line["seed"]), *accuracies])
    return _table(rows)


def _table(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
