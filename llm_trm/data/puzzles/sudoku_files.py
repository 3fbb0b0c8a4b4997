"""Reads Sudokus from CSV and JSONL files and from data sets on the hub."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import chain, repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from llm_trm.data.puzzles.sudoku import BLANKS, Shape, shape_of
from llm_trm.data.puzzles.sudoku_rows import Progress, SudokuRows, row_error, untracked
from llm_trm.data.puzzles.sudoku_text import SIZES, grids, is_grid, numbered_rows, without_comment
from llm_trm.errors import InputError, listed, one_line
from llm_trm.extras import require
from llm_trm.ranges import shown
from llm_trm.text import csv_lines, parse_json, read_lines

#: Column names in lower case.
_PUZZLE_COLUMNS = ("puzzle", "puzzles", "quiz", "quizzes", "question")
_SOLUTION_COLUMNS = ("solution", "solutions", "answer")
_RATING_COLUMNS = ("rating",)

_UNKNOWN = 255
#: Look-up table from bytes of text to digits.
_DIGITS = np.full(256, _UNKNOWN, dtype=np.uint8)
_DIGITS[[ord(blank) for blank in BLANKS]] = 0
_DIGITS[ord("1") : ord("9") + 1] = range(1, 10)

#: Endings of files with grids as text; see :mod:`llm_trm.data.puzzles.sudoku_text`.
_TEXT = (".sdk", ".sdm", ".ss")
_COLUMNS = "name the columns puzzle and solution"
_FILE = "name a CSV, JSONL, .sdk, .sdm or .ss file of puzzles"


class _Row(NamedTuple):
    """A raw row; a missing solution is None or empty."""

    puzzle: Any
    solution: Any = None
    rating: Any = None


def read_sudoku_file(path: Path) -> SudokuRows:
    """Read the puzzles of a file; :func:`~llm_trm.data.puzzles.sudoku_rows.verified` checks them.

    CSV: the columns are puzzle and solution, quizzes and solutions, or question and answer, in any order and
    among others, separated by commas or tabs. Without a header, the first column has puzzles and the second
    has solutions. JSONL: one object per line with the same names. A grid is a string, or a list of rows or
    cells. In strings ``. 0 _ - *`` are blanks, and spaces, line breaks, bars and what follows a ``#`` are
    ignored. In lists, 0 and null are blanks as well. ``.sdk``, ``.sdm`` and ``.ss``: see
    :mod:`~llm_trm.data.puzzles.sudoku_text`.

    Raises:
        InputError: The file cannot be read, or a row has no grid or a grid of another size than the first.
    """
    try:
        if path.suffix.lower() in _TEXT:
            rows: Iterator[_Row] = (_Row(cells) for _, cells in grids(list(read_lines(path))))
        elif path.suffix.lower() == ".jsonl":
            rows = _json_rows(path, csv_lines(path))
        else:
            rows = _csv_rows(path, csv_lines(path))
        return _collected(str(path), rows)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: {_FILE}") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read ({one_line(error)}): {_FILE}") from error


def read_sudoku_dataset(name: str, progress: Progress = untracked) -> dict[str, SudokuRows]:
    """Read the splits of a data set on the hub, such as ``sapientinc/sudoku-extreme``, without checks.

    It needs the same columns as a file.

    Raises:
        InputError: ``datasets`` is not installed, the data set cannot be loaded, or it has no Sudokus.
    """
    require("train", "datasets")
    import datasets

    # No common base: the hub's client raises errors of datasets, huggingface_hub, httpx and fsspec.
    try:
        splits = datasets.load_dataset(name)
    except Exception as error:
        raise InputError(
            f"the data set {name} cannot be loaded ({one_line(error)}): check its name and the network, or "
            "download its files and use --input"
        ) from error
    return {
        split: _collected(f"{name} ({split})", progress(_hub_rows(name, rows), len(rows)))
        for split, rows in splits.items()
    }


def _collected(source: str, rows: Iterable[_Row]) -> SudokuRows:
    """Convert all rows to arrays. Rejects the first row that differs in size."""
    puzzles: list[str] = []
    given: list[str] = []
    ratings: list[Any] = []
    size = 0
    for number, row in enumerate(rows, 1):
        try:
            puzzle = _text(row.puzzle, "puzzle")
            size = size or shape_of(len(puzzle)).cells
            solution = _text(row.solution, "solution") if row.solution else "0" * size
            for name, text in (("puzzle", puzzle), ("solution", solution)):
                if len(text) != size:
                    mixed = " as before: use one size per file" if len(text) in SIZES else ""
                    raise InputError(f"the {name} has {len(text)} cells instead of {size}{mixed}")
        except InputError as error:
            raise row_error(source, number, one_line(error, None)) from None
        puzzles.append(puzzle)
        given.append(solution)
        ratings.append(row.rating)
    if not puzzles:
        raise InputError(f"{source} has no puzzles: {_COLUMNS}, and put a grid in each row")
    shape = shape_of(size)
    return SudokuRows(
        source,
        shape,
        _digits(source, puzzles, "puzzle", shape),
        _digits(source, given, "solution", shape),
        np.arange(1, len(puzzles) + 1),
        None if all(rating is None for rating in ratings) else np.array(ratings, dtype=np.object_),
    )


def _text(grid: Any, name: str) -> str:
    """Convert a string, a list of cells or a list of rows to the characters of a grid."""
    if isinstance(grid, str):
        # The common case, four times as fast as the general one.
        if len(parts := grid.split()) == 1 and "#" not in grid:
            return parts[0]
        lines = [row for _, row in numbered_rows(grid.split("\n")) if row]
    elif not isinstance(grid, list):
        raise InputError(f"the {name} is {shown(grid)}, which is not a grid: use a string or a list")
    elif any(isinstance(row, (list, str)) and len(row) != 1 for row in grid):
        lines = [_text(row, name) for row in grid]
    else:
        return "".join(_cell(cell, name) for cell in grid)
    for number, line in enumerate(lines, 1):
        if len(line) != len(lines[0]):
            raise InputError(
                f"the {name} is ragged: row {number} has {len(line)} cells, row 1 has {len(lines[0])}"
            )
    return "".join(lines)


def _cell(cell: Any, name: str) -> str:
    text = "0" if cell is None else shown(cell) if isinstance(cell, int) else cell
    if isinstance(cell, bool) or not isinstance(text, str) or len(text) != 1:
        raise InputError(f"the {name} has a cell {shown(cell)}: use digits 1 to 9, and 0 or null for a blank")
    return text


def _digits(source: str, texts: Sequence[str], name: str, shape: Shape) -> npt.NDArray[np.uint8]:
    """Digits [N, L] of texts with L characters each."""
    # Each non-ASCII character becomes one "?", so that bytes still correspond to characters.
    codes = np.frombuffer("".join(texts).encode("ascii", "replace"), dtype=np.uint8)
    digits = _DIGITS[codes].reshape(-1, shape.cells)
    if digits.max() > shape.size:
        row, cell = (int(index) for index in np.argwhere(digits > shape.size)[0])
        fault = (
            f"{shape.cell_name(cell)} of the {name} is {texts[row][cell]!r}, which is neither a digit from 1 "
            f"to {shape.size} nor a blank ({' '.join(BLANKS)})"
        )
        raise row_error(source, row + 1, fault)
    return digits


@cache
def _columns(names: tuple[str, ...]) -> tuple[str, str | None, str | None]:
    """Names of the columns of puzzles, solutions and ratings."""

    def named(wanted: Sequence[str]) -> str | None:
        return next((name for name in names if name.strip().lower() in wanted), None)

    puzzle = named(_PUZZLE_COLUMNS)
    if puzzle is None:
        raise InputError(f"no column puzzle, quizzes or question among {listed(names)}: {_COLUMNS}")
    return puzzle, named(_SOLUTION_COLUMNS), named(_RATING_COLUMNS)


def _csv_rows(path: Path, lines: Iterator[str]) -> Iterator[_Row]:
    start = next((line for line in lines if not _is_preface(line)), None)
    if start is None:
        return
    records = (
        record
        for record in csv.reader(chain((start,), lines), delimiter=_delimiter(start))
        if any(cell.strip() for cell in record)
    )
    if (first := next(records, None)) is None:
        return
    try:
        columns = _columns(tuple(first))
    except InputError as error:
        if not is_grid(first[0]):
            raise InputError(
                f"{path} does not start with a grid of 16, 36 or 81 cells, and as a header this line has "
                f"{error}"
            ) from None
        yield from (_Row(*record[:2]) for record in chain((first,), records) if without_comment(record[0]))
        return
    indices = [first.index(name) if name else None for name in columns]
    for record in records:
        # A row with too few cells lacks the last columns.
        yield _Row(
            *(record[index] if index is not None and index < len(record) else None for index in indices)
        )


def _is_preface(line: str) -> bool:
    """Whether a line before the first row is empty or a comment."""
    start = line.strip()
    return not start or (start.startswith("#") and not _names_puzzles(start))


def _delimiter(line: str) -> str:
    """The delimiter of a file, by its first row. Tabs may also stand between the cells of a grid."""
    first, tab, _ = line.partition("\t")
    return "\t" if tab and "," not in line and (_names_puzzles(line) or is_grid(first)) else ","


def _names_puzzles(header: str) -> bool:
    names = re.split("[,\t]", header)
    return any(name.strip().strip('"').lower() in _PUZZLE_COLUMNS for name in names)


def _json_rows(path: Path, lines: Iterable[str]) -> Iterator[_Row]:
    for number, line in enumerate((line for line in lines if line.strip()), 1):
        try:
            record = parse_json(line)
            if not isinstance(record, dict):
                raise InputError(f"not a JSON object: {_COLUMNS}")
            row = _Row(*(record[name] if name else None for name in _columns(tuple(record))))
        # InputError is a ValueError as well.
        except ValueError as error:
            fault = one_line(error) if isinstance(error, InputError) else f"not JSON ({one_line(error)})"
            raise row_error(str(path), number, fault) from None
        yield row


def _hub_rows(name: str, rows: Any) -> Iterator[_Row]:
    try:
        columns = _columns(tuple(rows.column_names))
    except InputError as error:
        raise InputError(f"the data set {name} has {error}") from None
    for batch in rows.iter(batch_size=10_000):
        yield from map(_Row, *(batch[name] if name else repeat(None) for name in columns))
