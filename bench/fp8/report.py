"""Generates the tables of docs/fp8.md from ``bench/results/*.jsonl``."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.fp8.study import MODES
from bench.report import rewrite
from llm_trm.benchmark.results import read

Line = dict[str, Any]
_TRAININGS = {"float32": "none", "fp8-nograd": "the T - 1 without gradient"}


def latest(lines: Iterable[Line]) -> list[Line]:
    """The last line of each device, network and training."""
    found: dict[tuple[Any, ...], Line] = {}
    for line in lines:
        found[tuple(line[name] for name in ("device", "family", "training", "seed"))] = line
    return list(found.values())


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _spread(values: Sequence[float], form: str, scale: float = 1.0) -> str:
    """Mean and standard deviation over the seeds."""
    values = [scale * value for value in values]
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{form}} ± {deviation:{form}}"


def inference(lines: Sequence[Line]) -> str:
    """Errors and accuracies of all inference precisions, for networks trained in float32."""
    trained = [line["evaluation"] for line in lines if line["training"] == "float32"]

    def row(mode: str) -> list[str]:
        found = [evaluation[mode] for evaluation in trained]
        errors = [
            _spread([one[name] for one in found], ".1e")
            for name in ("y first", "z first", "y last", "z last")
        ]
        accuracies = [_spread([one[name] for one in found], ".1f", 100.0) for name in ("cells", "exact")]
        return [mode, *errors, *accuracies]

    header = ["inference in", "y, one recursion", "z, one recursion", "y, whole loop", "z, whole loop"]
    return _table([*header, "cells %", "puzzles %"], map(row, MODES))


def training(lines: Sequence[Line]) -> str:
    """Results of training with and without fp8."""

    def row(name: str) -> list[str]:
        of_name = sorted(
            (line for line in lines if line["training"] == name), key=lambda line: int(line["seed"])
        )
        plain = [line["evaluation"]["float32"] for line in of_name]
        return [
            _TRAININGS[name],
            _spread([line["training_loss"] for line in of_name], ".4f"),
            _spread([one["loss"] for one in plain], ".4f"),
            _spread([one["cells"] for one in plain], ".1f", 100.0),
            _spread([one["exact"] for one in plain], ".1f", 100.0),
            _spread([line["evaluation"]["fp8"]["exact"] for line in of_name], ".1f", 100.0),
            ", ".join(f"{100.0 * one['exact']:.1f}" for one in plain),
        ]

    header = ["in fp8", "training loss", "test loss", "cells %", "puzzles %", "puzzles %, inference in fp8"]
    return _table([*header, "puzzles % by seed"], map(row, _TRAININGS))


def _section(lines: Sequence[Line]) -> list[str]:
    line = lines[0]
    settings, versions = line["settings"], line["versions"]
    how = "emulated" if line["emulated"] else "the kernels"
    commits = ", ".join(sorted({str(one["commit"])[:13] for one in lines}))
    parts = [
        f"## {line['device']}, fp8 {how}",
        f"torch {versions['torch']}, commit {commits}, {line['time'][:10]}. Networks of {settings['layers']} "
        f"layers, width {settings['width']}, n = {settings['n']}, T = {settings['T']}; "
        f"{settings['supervision']} supervision steps, each an update; batches of {settings['batch']}; "
        f"{settings['tested']} held-out puzzles. Mean ± standard deviation over seeds.",
    ]
    for family in sorted({str(one["family"]) for one in lines}, reverse=True):
        of_family = [one for one in lines if one["family"] == family]
        what = f"{family} block, {of_family[0]['settings']['batches']} batches"
        what += f", {len({one['seed'] for one in of_family})} seeds"
        parts += [
            f"**{what}: trained in float32; relative errors against float64**",
            inference(of_family),
            f"**{what}: trained with and without fp8, tested in float32**",
            training(of_family),
        ]
    return parts


def _speed(folder: Path) -> str:
    rows = (row for path in folder.glob("*.jsonl") for line in read(path) for row in line.get("rows", ()))
    if any(row["backend"].startswith("triton-fp8") and row["median_ms"] for row in rows):
        return "Speed: the `triton-fp8` rows of [benchmarks.md](benchmarks.md)."
    return "Speed: not measured yet."


def draw(root: Path, results: Path) -> bool:
    """Replace the text between the markers of docs/fp8.md. Returns False if it has no markers."""
    lines = latest(read(results))
    parts = []
    for device in sorted({str(line["device"]) for line in lines}):
        parts += _section([line for line in lines if line["device"] == device])
    if all(line["emulated"] for line in lines):
        parts.append("With the kernels, on a GPU: not measured yet.")
    return rewrite(root / "docs" / "fp8.md", "\n\n".join([*parts, _speed(root / "bench" / "results")]))
