"""Generates the results in docs/training.md from files in ``bench/results``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.latent import RESULTS as LATENT
from bench.puzzle_report import latest
from llm_trm.benchmark.results import read
from llm_trm.benchmark.table import number
from llm_trm.evaluate.phase2 import TRM, TRUE_STATE

#: Results of ``examples/arithmetic.sh``: its phase2.json, written by ``llm-trm eval phase2 --by operations``.
ARITHMETIC = "arithmetic.json"
#: Results of ``python -m bench.training``.
TRAINERS = "training.jsonl"


def text(results: Path) -> str:
    """The arithmetic world and the speed of the trainer, as Markdown."""
    world, trainers = results / ARITHMETIC, results / TRAINERS
    parts = ["### The arithmetic world"]
    if world.exists():
        parts.append(_arithmetic(json.loads(world.read_text()), _own_answers(results / LATENT.name)))
    else:
        parts.append("Not measured yet.")
    parts.append("### Speed")
    parts.append(_trainers(list(read(trainers))) if trainers.exists() else "Not measured yet.")
    return "\n\n".join(parts)


def _own_answers(path: Path) -> Mapping[str, Mapping[str, Any]]:
    """Scores of the plain language model by number of operations, from ``llm-trm eval lm``."""
    lines = latest(path)
    return lines[0]["groups"] if lines else {}


def _arithmetic(found: Mapping[str, Any], answers: Mapping[str, Mapping[str, Any]]) -> str:
    """One line per number of operations: recursion, baselines, upper bound, the language model's answers."""
    rows = [("all", found["rows"]), *found["groups"].items()]
    baselines = [name for name in found["rows"] if name not in (TRM, TRUE_STATE)]
    lines = [
        ["operations", "pairs", "cosine", "MSE", "rank 1 (95% interval)", "steps"]
        + [f"{name}: cosine, rank 1" for name in (*baselines, TRUE_STATE)]
        + ["language model: thinking, without"],
    ]
    lines.append(["---"] + ["---:"] * (len(lines[0]) - 1))
    for group, scores in rows:
        ours = scores[TRM]
        low, high = ours["rank1_interval"]
        cells = [group, str(ours["pairs"]), f"{ours['cosine']:.4f}", number(ours["mse"])]
        cells += [f"{ours['rank1']:.1%} ({low:.1%} to {high:.1%})", f"{ours['steps']:.1f}"]
        for name in (*baselines, TRUE_STATE):
            cells.append(f"{scores[name]['cosine']:.4f}, {scores[name]['rank1']:.1%}")
        own = answers.get(group)
        cells.append(
            ", ".join(f"{own[mode]['accuracy']:.1%}" for mode in ("think", "no-think")) if own else "-"
        )
        lines.append(cells)
    return _table(lines)


def _trainers(measured: Sequence[Mapping[str, Any]]) -> str:
    """The latest line of every case on every device."""
    in_order = sorted(measured, key=lambda line: line["time"])
    latest = {(line["device"], line["name"]): line for line in in_order}
    lines = [["case", "device", "original, samples/s", "llm-trm, samples/s", "ratio"]]
    lines.append(["---", "---", "---:", "---:", "---:"])
    for (device, name), line in latest.items():
        speeds = [number(line["trainers"][trainer]["samples_per_s"]) for trainer in ("plain", "llm-trm")]
        lines.append([name.removeprefix("phase2 trainer "), device, *speeds, f"{line['ratio']:.2f}"])
    on_gpu = any(line["machine"]["device_type"] == "cuda" for line in measured)
    missing = [] if on_gpu else ["On a GPU: not measured yet."]
    return "\n\n".join([_table(lines), *missing])


def _table(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
