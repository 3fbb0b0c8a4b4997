"""Reads ARC's public JSON files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llm_trm.data.folders import data_files
from llm_trm.data.puzzles.arc import COLOURS, SIDE, ArcTask, Grid, Pair
from llm_trm.errors import InputError
from llm_trm.files import read_json
from llm_trm.ranges import shown

_CHALLENGES, _SOLUTIONS = "_challenges", "_solutions"
_REMEDY = "name a folder of ARC tasks, a task's .json file, or an ARC Prize *_challenges.json file"


def read_tasks(path: Path) -> list[ArcTask]:
    """Read the tasks of one source, sorted by name.

    Args:
        path: A folder with one JSON file per task, such a file, or a ``*_challenges.json`` file, whose
            answers are read from the ``*_solutions.json`` file next to it. Either all test pairs of the
            source have answers or, as in the challenges of a running contest, none has.

    Raises:
        InputError: A file cannot be read, or a task in it is invalid; the message names both.
    """
    if path.is_dir():
        files = data_files(path, ".json")
        if not files:
            raise InputError(f"{path} has no .json file: {_REMEDY}")
        if paired := [file.name for file in files if file.stem.endswith(_CHALLENGES)]:
            raise InputError(f"{path} contains sets of tasks: name one of them, such as {path / paired[0]}")
        tasks = [_task(file, file.stem, read_json(file, _REMEDY)) for file in files]
    elif path.stem.endswith(_CHALLENGES) and path.suffix.lower() == ".json":
        content = _mapping(path, read_json(path, _REMEDY))
        tasks = [_task(path, name, content[name]) for name in sorted(content)]
        solutions = path.with_stem(path.stem.removesuffix(_CHALLENGES) + _SOLUTIONS)
        if solutions.exists():
            answers = _mapping(solutions, read_json(solutions, _REMEDY))
            tasks = [_solved(solutions, task, answers.get(task.name)) for task in tasks]
    else:
        tasks = [_task(path, path.stem, read_json(path, _REMEDY))]
    if not tasks:
        raise InputError(f"{path} has no tasks: {_REMEDY}")
    if any(is_labelled(task) for task in tasks):
        for task in tasks:
            for number, pair in enumerate(task.test, 1):
                if pair.output is None:
                    raise InputError(
                        f"{path}, task {task.name}, test pair {number} has no solution, but others do: add "
                        "it, or remove the task"
                    )
    return tasks


def is_labelled(task: ArcTask) -> bool:
    """Whether the answer to any test pair is known."""
    return any(pair.output is not None for pair in task.test)


def merged(sources: Iterable[tuple[Path, list[ArcTask]]]) -> list[ArcTask]:
    """The tasks of all sources without duplicates.

    Raises:
        InputError: Two different tasks have the same name.
    """
    tasks: dict[str, tuple[Path, ArcTask]] = {}
    for path, found in sources:
        for task in found:
            before, known = tasks.setdefault(task.name, (path, task))
            if known is not task and _content(known) != _content(task):
                raise InputError(
                    f"task {task.name} of {path} differs from the one in {before}: use only one of the two "
                    "sources, or remove the task from one"
                )
    return [task for _, task in tasks.values()]


def _content(task: ArcTask) -> tuple[Counter[Any], Counter[Any]]:
    train, test = (
        Counter((_key(pair.input), None if pair.output is None else _key(pair.output)) for pair in pairs)
        for pairs in (task.train, task.test)
    )
    return train, test


def _key(grid: Grid) -> tuple[int, bytes]:
    return len(grid), grid.tobytes()


def _task(path: Path, name: str, content: Any) -> ArcTask:
    where = f"{path}, task {name}"
    parts = {}
    for part in ("train", "test"):
        pairs = content.get(part) if isinstance(content, dict) else None
        if not isinstance(pairs, list) or not pairs:
            raise InputError(f"{where} has no {part} pairs: {_REMEDY}")
        parts[part] = tuple(
            _pair(f"{where}, {part} pair {number}", pair, part == "train")
            for number, pair in enumerate(pairs, 1)
        )
    return ArcTask(name, parts["train"], parts["test"])


def _pair(where: str, content: Any, solved: bool) -> Pair:
    if not isinstance(content, dict) or "input" not in content:
        raise InputError(f"{where} has no input: fix or remove the task")
    output = content.get("output")
    if output is None and solved:
        raise InputError(f"{where} has no output: fix or remove the task")
    return Pair(
        _grid(f"{where}, input", content["input"]),
        None if output is None else _grid(f"{where}, output", output),
    )


def _solved(path: Path, task: ArcTask, answers: Any) -> ArcTask:
    where = f"{path}, task {task.name}"
    if not isinstance(answers, list) or len(answers) != len(task.test):
        number = len(answers) if isinstance(answers, list) else 0
        raise InputError(
            f"{where} has {number or 'no'} solution{'s' * (number > 1)}, but needs {len(task.test)}: add "
            "them, or remove the task"
        )
    test = tuple(
        replace(pair, output=_grid(f"{where}, solution {number}", answer))
        for number, (pair, answer) in enumerate(zip(task.test, answers, strict=True), 1)
    )
    return replace(task, test=test)


def _grid(where: str, rows: Any) -> Grid:
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) and row for row in rows):
        raise InputError(f"{where} is not a grid: it must be a list of rows, each a list of colours")
    for number, row in enumerate(rows, 1):
        if len(row) != len(rows[0]):
            raise InputError(
                f"{where}: the grid is ragged: row {number} has {len(row)} cells, row 1 has {len(rows[0])}"
            )
        for colour in row:
            # In Python, True is an int and equals 1.
            if type(colour) is not int or not 0 <= colour < COLOURS:
                raise InputError(
                    f"{where}, row {number}: {shown(colour)} is not a colour: colours are 0 to 9"
                )
    if max(len(rows), len(rows[0])) > SIDE:
        raise InputError(f"{where} has {len(rows)} x {len(rows[0])} cells: the maximum is {SIDE} x {SIDE}")
    return np.array(rows, dtype=np.uint8)


def _mapping(path: Path, content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise InputError(f"{path} is not an object that maps names to tasks: {_REMEDY}")
    return content
