"""Generates the results in docs/puzzles.md from files in ``bench/results``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.puzzle import STEPS as STEPS_OF_A_RUN
from llm_trm.benchmark.results import read
from llm_trm.benchmark.table import number
from llm_trm.files import replacing

#: Results of ``python -m bench.puzzle`` and ``python -m bench.puzzle_training``.
STEPS, RUNS = "puzzle.jsonl", "puzzle_training.jsonl"
#: Results of ``python -m bench.gpu``.
GPU = "gpu.jsonl"
#: Batch size of the official run.
OFFICIAL_BATCH = 768
PLOT = "puzzle-training.png"

_STEP = "puzzle step "
#: The time for Sudoku-Extreme at L 81 on one H100 in olivkoch/nano-trm's README.
_PUBLISHED = "Published by others: nano-trm, about 1 h for its Sudoku-Extreme run on one H100 (its README)."


def text(results: Path) -> str:
    """Accuracy of training runs and the speed of a step, as Markdown."""
    runs = latest(results / RUNS)
    # The results file of a GPU run has lines of other kinds as well.
    steps = [
        line
        for path in (results / STEPS, results / GPU)
        for line in latest(path)
        if line["name"].startswith(_STEP)
    ]
    parts = ["### Sudoku from scratch, tiny preset"]
    parts += [_runs(runs), f"![accuracy against minutes]({PLOT})"] if runs else ["Not measured yet."]
    parts.append("### A training step, against a re-implementation of the official trainer")
    parts.append(_steps(steps) if steps else "Not measured yet.")
    if not any(line["machine"]["device_type"] == "cuda" for line in steps):
        parts.append(f"On a GPU: not measured yet. {_PUBLISHED}")
    return "\n\n".join(parts)


def latest(path: Path) -> list[dict[str, Any]]:
    """The latest line of every case on every device."""
    if not path.exists():
        return []
    in_order = sorted(read(path), key=lambda line: line["time"])
    return list({(line.get("device"), line["name"]): line for line in in_order}.values())


def _runs(lines: Sequence[Mapping[str, Any]]) -> str:
    head = "grid|seed|device|training puzzles|minutes|held out|exact (95% interval)"
    rows = [[*head.split("|"), *(mode["name"] for mode in lines[0]["modes"][1:])]]
    rows.append(["---"] + ["---:"] * (len(rows[0]) - 1))
    for line in sorted(lines, key=lambda line: (line["size"], line["seed"])):
        whole, *halting = line["modes"]
        low, high = whole["exact_interval"]
        rows.append(
            [
                f"{line['size']}x{line['size']}",
                str(line["seed"]),
                line["device"],
                str(line["puzzles"]),
                f"{line['seconds'] / 60:.1f}",
                str(line["held_out"]),
                f"{whole['exact']:.1%} ({low:.1%} to {high:.1%})",
                *(
                    f"{mode['exact']:.1%}, {mode['steps']:.2f} of {mode['max_steps']} steps, "
                    f"{whole['seconds_per_puzzle'] / mode['seconds_per_puzzle']:.2f}x faster"
                    for mode in halting
                ),
            ]
        )
    return _table(rows)


def _steps(lines: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for line in lines for name in line["trainers"]))
    rows = [["case", "device", *(f"{name}, ms" for name in names), "against eager", "hours for 65,100 steps"]]
    rows.append(["---", "---"] + ["---:"] * (len(rows[0]) - 2))
    for line in lines:
        medians = {name: figures["median_ms"] for name, figures in line["trainers"].items()}
        rows.append(
            [
                line["name"].removeprefix(_STEP),
                line["device"],
                *(number(medians[name]) if name in medians else "-" for name in names),
                f"{line['ratio']['official, eager']:.2f}x",
                _hours(line),
            ]
        )
    return _table(rows)


def _hours(line: Mapping[str, Any]) -> str:
    """Hours of the official run, if its step was timed."""
    if line["case"]["preset"] != "paper" or line["case"]["batch"] != OFFICIAL_BATCH:
        return "-"
    return number(STEPS_OF_A_RUN * line["trainers"]["llm-trm"]["median_ms"] / 3.6e6)


def _table(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def plot(results: Path, path: Path) -> None:
    """Plot the accuracy on held-out puzzles against minutes of training, if there are runs."""
    runs = latest(results / RUNS)
    if not runs:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    try:
        for line in sorted(runs, key=lambda line: (line["size"], line["seed"])):
            axis.plot(
                [0.0, *(record["seconds"] / 60 for record in line["history"])],
                [0.0, *(100 * record["test"]["exact"] for record in line["history"])],
                marker="o",
                markersize=3,
                label=f"{line['size']}x{line['size']}, seed {line['seed']}, {line['device']}",
            )
        axis.set_xlabel("minutes of training")
        axis.set_ylabel("held-out Sudokus solved, %")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
        with replacing(path) as temporary:
            # Omit the version from the file, so that equal results give equal bytes.
            figure.savefig(temporary, dpi=120, format="png", metadata={"Software": None})
    finally:
        plt.close(figure)
