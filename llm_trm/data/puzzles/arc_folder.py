"""Folders of ARC puzzles, with ``arc.json``: the meaning of puzzle identifiers, and the test pairs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

import numpy as np

from llm_trm.data.puzzles.arc import SIDE, VOCAB_SIZE, Grid, Pair, Transform
from llm_trm.data.puzzles.arc_splits import ArcPlan, Progress
from llm_trm.data.puzzles.dataset import (
    ARC_FILE,
    INFO_FILE,
    PuzzleInfo,
    require_unchanged_file,
    write_puzzles,
)
from llm_trm.errors import InputError
from llm_trm.files import read_json

_REMEDY = "name a folder that `llm-trm data arc` wrote"


@dataclass(frozen=True)
class ArcKey:
    """Content of ``arc.json``.

    Attributes:
        identifiers: The task's name and the symmetry of each puzzle identifier; None for the blank one, 0.
        tests: The original test pairs of each held-out task.
    """

    identifiers: list[tuple[str, Transform] | None]
    tests: dict[str, tuple[Pair, ...]]


def write_arc(
    folder: Path, plan: ArcPlan, facts: Mapping[str, Any], progress: Progress | None = None
) -> PuzzleInfo:
    """Write the puzzles of ``plan`` and ``arc.json``.

    Raises:
        InputError: The folder is not writable.
    """
    identifiers = [
        None if entry is None else (entry[0], entry[1].dihedral, "".join(map(str, entry[1].colours)))
        for entry in plan.identifiers()
    ]
    tests = {
        task.name: [{"input": _rows(pair.input), "output": _rows(pair.output)} for pair in task.test]
        for task in plan.held_out
    }
    info = PuzzleInfo("arc", SIDE, SIDE, VOCAB_SIZE, plan.num_puzzles, dict(facts))
    splits = plan.splits(progress)
    # On one line: with indentation, a thousand symmetries of 400 tasks would take two million lines.
    key = json.dumps({"identifiers": identifiers, "tests": tests}, separators=(",", ":"))
    write_puzzles(folder, info, splits, {ARC_FILE: key})
    return info


def read_arc(folder: Path) -> ArcKey:
    """Read ``arc.json`` of ``folder``.

    Raises:
        InputError: The file is missing or invalid.
    """
    content = read_json(folder / ARC_FILE, _REMEDY)
    try:
        identifiers = [
            None if entry is None else (str(entry[0]), Transform(index(entry[1]), tuple(map(int, entry[2]))))
            for entry in content["identifiers"]
        ]
        tests = {
            name: tuple(Pair(_grid(pair["input"]), _output(pair["output"])) for pair in pairs)
            for name, pairs in content["tests"].items()
        }
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError):
        raise InputError(f"{folder / ARC_FILE} does not describe ARC puzzles: {_REMEDY}") from None
    if (folder / INFO_FILE).exists():
        require_unchanged_file(folder, ARC_FILE)
    return ArcKey(identifiers, tests)


def _rows(grid: Grid | None) -> list[list[int]] | None:
    return None if grid is None else grid.tolist()


def _grid(rows: Any) -> Grid:
    grid = np.array(rows, dtype=np.uint8)
    if grid.ndim != 2:
        raise ValueError
    return grid


def _output(rows: Any) -> Grid | None:
    return None if rows is None else _grid(rows)
