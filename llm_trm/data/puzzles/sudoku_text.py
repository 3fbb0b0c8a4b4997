"""Sudokus as people exchange them: grids with rules and bars, comments, metadata.

The formats, by the usual ending of the file:

- ``.sdk`` (SadMan): lines of metadata that begin with ``#``, then a row per line; or ``[Puzzle]`` and a row
  per line, then ``[State]`` and the cells that are filled in so far.
- ``.sdm``: a puzzle per line, as in lists of hard puzzles, which add ``# ED=`` and the ratings of
  SudokuExplainer.
- ``.ss`` (Simple Sudoku): rows with ``|`` between boxes, and rules of dashes between bands.

Drawings with box characters are read as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from llm_trm.data.puzzles.sudoku import BLANKS, SHAPES

#: Numbers of cells of a grid.
SIZES = frozenset(shape.cells for shape in SHAPES.values())

_COMMENT = re.compile(r"#.*|\bED=.*", re.DOTALL)
_SECTION = re.compile(r"\[([A-Za-z]+)\]")
#: Lines between cells: ASCII's vertical bar, and all of Unicode's box-drawing characters.
_BARS = re.compile("[|\u2500-\u257f]")
_UPRIGHT = re.compile("[|\u2502\u2503\u2551\u2506\u2507\u250a\u250b\u254e\u254f]")
_RULE = re.compile(r"[-+=*|:]+")
_CELLS = frozenset("123456789" + BLANKS)


def without_comment(text: str) -> str:
    """``text`` without ``#`` or ``ED=`` and what follows them."""
    return _COMMENT.sub("", text)


def is_grid(text: str) -> bool:
    """Whether ``text`` may be a grid: most of its characters are cells, and it has as many as a grid has."""
    cells = "".join(row for _, row in numbered_rows(text.split("\n")))
    return len(cells) in SIZES and 2 * sum(cell in _CELLS for cell in cells) > len(cells)


def only_cells(lines: Sequence[str]) -> bool:
    """Whether the lines have cells of a Sudoku and, apart from comments, rules and bars, nothing else."""
    cells = "".join(row for _, row in numbered_rows(lines))
    return bool(cells) and _CELLS.issuperset(cells)


def numbered_rows(lines: Sequence[str]) -> Iterator[tuple[int, str]]:
    """The cells of each line and its number, from 1. A line without cells is empty; rules are left out."""
    barred = any(_UPRIGHT.search(line) for line in lines)
    section = "puzzle"
    for number, line in enumerate(lines, 1):
        if named := _SECTION.fullmatch(line.strip()):
            section = named[1].lower()
        text = without_comment(line)
        if section != "puzzle" or named:
            yield number, ""
        elif not _is_rule(text, barred):
            yield number, "".join(_BARS.sub("", text).split())


def _is_rule(line: str, barred: bool) -> bool:
    """Whether a line only separates bands.

    Dashes and asterisks are blanks as well: without a plus, they are a rule only where rows have bars and
    this line has none.
    """
    marks = "".join(line.split())
    if not _BARS.sub("", marks):
        return bool(marks)
    return _RULE.fullmatch(marks) is not None and ("+" in marks or (barred and not _UPRIGHT.search(marks)))


def grids(lines: Sequence[str]) -> Iterator[tuple[int, str]]:
    """The cells of each grid in a text, and the number of its first line.

    A grid is on one line, or has a line per row; empty lines or comments separate grids. Lines that belong to
    no grid come one by one, whatever they contain.
    """
    blocks: list[list[tuple[int, str]]] = [[]]
    for number, row in numbered_rows(lines):
        if row:
            blocks[-1].append((number, row))
        elif blocks[-1]:
            blocks.append([])
    everything = [row for block in blocks for row in block]
    # A single puzzle may have empty lines between its bands.
    if not all(len(row) in SIZES for _, row in everything) and _count(everything) in SIZES:
        blocks = [everything]
    for block in filter(None, blocks):
        if _count(block) in SIZES:
            yield block[0][0], "".join(row for _, row in block)
        else:
            yield from block


def _count(rows: Sequence[tuple[int, str]]) -> int:
    return sum(len(row) for _, row in rows)
