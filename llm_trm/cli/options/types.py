"""Types of options: finite numbers within bounds, lists of them, names, files and folders.

A number out of range is rejected before any work starts. The ranges are those of :mod:`llm_trm.ranges`, which
also apply to settings and files.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from llm_trm import ranges
from llm_trm.ranges import Range, Real, Whole, shown
from llm_trm.text import is_text


class WholeNumber(click.IntRange):
    """A whole number within a range."""

    def __init__(self, within: Whole) -> None:
        super().__init__(within.least, within.most)
        self.within = within

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """See :meth:`click.ParamType.convert`."""
        return int(_number(self, value, int, "a whole number", self.within, param, ctx))


class RealNumber(click.FloatRange):
    """A finite number within a range."""

    def __init__(self, within: Real) -> None:
        super().__init__(within.least, within.most, within.least_open, within.most_open)
        self.within = within

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """See :meth:`click.ParamType.convert`."""
        return float(_number(self, value, float, "a number", self.within, param, ctx))


class WholeNumbers(click.ParamType[tuple[int, ...]]):
    """Whole numbers within a range, separated by commas; repeated numbers count once."""

    name = "whole numbers"

    def __init__(self, within: Whole) -> None:
        self.within = within

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """See :meth:`click.ParamType.convert`."""
        words = value.split(",") if isinstance(value, str) else value
        what = "a whole number; write for example 32,64,96"
        found = (_number(self, word, int, what, self.within, param, ctx) for word in words)
        return tuple(dict.fromkeys(found))


class Grid(click.ParamType[tuple[int, int]]):
    """Rows and columns, written 9x9."""

    name = "grid"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        """See :meth:`click.ParamType.convert`."""
        rows, _, columns = str(value).partition("x")
        if not (rows.isdecimal() and columns.isdecimal()):
            self.fail(f"{shown(value)} is not a grid; give rows and columns, for example 9x9", param, ctx)
        within = ranges.GRID_SIDE
        height, width = (
            _number(self, side, int, "a whole number", within, param, ctx) for side in (rows, columns)
        )
        return height, width


def _number(
    kind: click.ParamType[Any],
    value: Any,
    parse: Callable[[str], Any],
    what: str,
    within: Range,
    param: click.Parameter | None,
    ctx: click.Context | None,
) -> Any:
    if isinstance(value, str):
        try:
            value = parse(value)
        except ValueError:
            kind.fail(f"{shown(value)} is not {what}", param, ctx)
    if (fault := within.fault(value)) is not None:
        kind.fail(fault, param, ctx)
    return value


class Name(click.types.StringParamType):
    """A name that is not empty, in UTF-8."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """See :meth:`click.ParamType.convert`."""
        return str(super().convert(_named(self, value, param, ctx), param, ctx))


class AnyPath(click.Path):
    """A path that is not empty, as a :class:`Path`.

    An empty one would be the current folder, and so ``--output "$UNSET"`` would write into it. A name that is
    not UTF-8 could not be read back from the JSON files that record it.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(path_type=Path, **options)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See :meth:`click.ParamType.convert`."""
        return super().convert(_named(self, value, param, ctx), param, ctx)


def _named(
    kind: click.ParamType[Any], value: Any, param: click.Parameter | None, ctx: click.Context | None
) -> Any:
    if isinstance(value, str):
        if not value.strip():
            kind.fail("the name is empty: give one, or leave the option out", param, ctx)
        if not is_text(value):
            kind.fail(f"{shown(value, 200)} is not text in UTF-8: choose another name", param, ctx)
    return value


NAME = Name()
PATH = AnyPath()
FOLDER = AnyPath(file_okay=False)
#: A file to read; ``-`` is standard input where the command supports it.
FILE = AnyPath(dir_okay=False, allow_dash=True)


def number(within: Range) -> WholeNumber | RealNumber:
    """The type of an option whose value is a number within a range."""
    return WholeNumber(within) if isinstance(within, Whole) else RealNumber(within)
