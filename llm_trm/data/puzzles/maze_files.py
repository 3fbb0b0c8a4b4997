"""Reads mazes with answers from CSV and JSONL files and from the Hugging Face hub."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llm_trm.data.puzzles.maze import MazeGrid, parse_maze, solution_fault
from llm_trm.errors import InputError, listed, one_line
from llm_trm.extras import require
from llm_trm.text import csv_lines, parse_json, read_lines

#: Names of the two columns; the first pair is the hub's.
_COLUMNS = (("question", "answer"), ("maze", "solution"))

Mazes = list[tuple[MazeGrid, MazeGrid]]


def read_mazes(path: Path) -> Mazes:
    """Read the mazes and answers of a file. All have the same size, and each answer is a shortest path.

    Args:
        path: A ``.csv`` file with a header, or a ``.jsonl`` file of objects. Either has the columns
            ``question`` and ``answer`` (or ``maze`` and ``solution``), in a format that
            :func:`~llm_trm.data.puzzles.maze.parse_maze` accepts. Rows are counted from 1, without the
            header.

    Raises:
        InputError: The file cannot be read, or a row is not a solved maze; the message names the row.
    """
    readers = {".csv": _csv_records, ".jsonl": _json_records}
    if (read := readers.get(path.suffix.lower())) is None:
        raise InputError(f"{path} is neither a .csv nor a .jsonl file: name one")
    try:
        return _mazes(str(path), read(path))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: name a .csv or .jsonl file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason}): convert it") from None
    except (OSError, csv.Error) as error:
        raise InputError(f"{path} cannot be read ({one_line(error)}): name another file") from error


def load_mazes(dataset: str, split: str) -> Mazes:
    """Load the mazes and answers of a data set on the hub, such as ``sapientinc/maze-30x30-hard-1k``.

    Args:
        dataset: Name for ``datasets.load_dataset``, with the columns of :func:`read_mazes`.
        split: ``"train"`` or ``"test"``.

    Raises:
        InputError: The data set cannot be loaded, or a row is not a solved maze.
    """
    require("train", "datasets")
    from datasets import load_dataset

    try:
        records = list(load_dataset(dataset, split=split, streaming=True))
    # No common base: the hub's client raises errors of datasets, huggingface_hub, httpx and fsspec.
    except Exception as error:
        raise InputError(
            f"{dataset}, split {split}, cannot be loaded ({one_line(error)}): check the name and the "
            "network, or read a .csv or .jsonl file with --input"
        ) from error
    return _mazes(f"{dataset}, split {split}", records)


def _csv_records(path: Path) -> Iterator[Mapping[str, Any]]:
    yield from csv.DictReader(csv_lines(path))


def _json_records(path: Path) -> Iterator[Any]:
    for row, line in enumerate((line for line in read_lines(path) if line.strip()), 1):
        try:
            yield parse_json(line)
        except ValueError:
            raise InputError(f"{path}, row {row} is not JSON: fix or remove the line") from None


def _mazes(source: str, records: Iterator[Any] | list[Any]) -> Mazes:
    found: Mazes = []
    for row, record in enumerate(records, 1):
        where = f"{source}, row {row}"
        maze, answer = (_grid(where, text) for text in _texts(where, record))
        if found and maze.shape != (first := found[0][0].shape):
            raise InputError(
                f"{where} has {maze.shape[0]} x {maze.shape[1]} cells, row 1 has {first[0]} x {first[1]}: "
                "all mazes must have the same size"
            )
        if fault := solution_fault(maze, answer):
            raise InputError(f"{where}: {fault}: fix or remove the row")
        found.append((maze, answer))
    if not found:
        raise InputError(f"{source} has no mazes: name another source")
    return found


def _texts(where: str, record: Any) -> tuple[str, str]:
    names = record if isinstance(record, Mapping) else {}
    for question, answer in _COLUMNS:
        if isinstance(names.get(question), str) and isinstance(names.get(answer), str):
            return names[question], names[answer]
    there = listed(map(repr, names)) or "none"
    raise InputError(
        f"{where} lacks a maze or its answer (columns: {there}): it needs the text columns 'question' and "
        "'answer', or 'maze' and 'solution'"
    )


def _grid(where: str, text: str) -> MazeGrid:
    try:
        return parse_maze(text)
    except ValueError as error:
        raise InputError(f"{where}: {error}: fix or remove the row") from None
