"""Types of options that commands share: finite numbers within bounds, lists of them, folders.

Numbers are refused before any work begins. Their ranges are those of :mod:`llm_trm.ranges`, to which settings
and files are held as well.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from llm_trm import ranges
from llm_trm.ranges import Range, Real, Whole, shown


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
    """Whole numbers within a range, with commas between; each counts once."""

    name = "whole numbers"

    def __init__(self, within: Whole) -> None:
        self.within = within

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """See :meth:`click.ParamType.convert`."""
        words = value.split(",") if isinstance(value, str) else value
        what = "a whole number; write for instance 32,64,96"
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
            self.fail(f"{shown(value)} is no grid; give rows and columns, as 9x9", param, ctx)
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


FOLDER = click.Path(path_type=Path, file_okay=False)

COUNT = WholeNumber(ranges.COUNT)
NO_OR_COUNT = WholeNumber(ranges.NO_OR_COUNT)
BATCH = WholeNumber(ranges.BATCH)
WIDTH = WholeNumber(ranges.WIDTH)
NO_OR_WIDTH = WholeNumber(ranges.NO_OR_WIDTH)
LAYERS = WholeNumber(ranges.LAYERS)
ADAPTER_RANK = WholeNumber(ranges.ADAPTER_RANK)
LENGTH = WholeNumber(ranges.LENGTH)
NO_OR_LENGTH = WholeNumber(ranges.NO_OR_LENGTH)
DEPTH = WholeNumber(ranges.DEPTH)
NO_OR_DEPTH = WholeNumber(ranges.NO_OR_DEPTH)
GROUP = WholeNumber(ranges.GROUP)
TOKENS = WholeNumber(ranges.TOKENS)
OPERATIONS = WholeNumber(ranges.OPERATIONS)
MODULUS = WholeNumber(ranges.MODULUS)
MAZE_SIDE = WholeNumber(ranges.MAZE_SIDE)
PATH_STEPS = WholeNumber(ranges.PATH_STEPS)
CLUES = WholeNumber(ranges.CLUES)
SYMMETRIES = WholeNumber(ranges.SYMMETRIES)
SEED = WholeNumber(ranges.SEED)
TRAINER_SEED = WholeNumber(ranges.TRAINER_SEED)
WIDTHS = WholeNumbers(ranges.WIDTH)
LEARNING_RATE = RealNumber(ranges.LEARNING_RATE)
EPOCHS = RealNumber(ranges.EPOCHS)
WEIGHT = RealNumber(ranges.WEIGHT)
CLIP_NORM = RealNumber(ranges.CLIP_NORM)
SPREAD = RealNumber(ranges.SPREAD)
NO_OR_SPREAD = RealNumber(ranges.NO_OR_SPREAD)
SHARE = RealNumber(ranges.SHARE)
SHARE_BELOW_ONE = RealNumber(ranges.SHARE_BELOW_ONE)
SHARE_ABOVE_ZERO = RealNumber(ranges.SHARE_ABOVE_ZERO)
SHARE_WITHIN = RealNumber(ranges.SHARE_WITHIN)
HELD_OUT = RealNumber(ranges.HELD_OUT)
COSINE = RealNumber(ranges.COSINE)
SECONDS = RealNumber(ranges.SECONDS)
MINUTES = RealNumber(ranges.MINUTES)
DELAY = RealNumber(ranges.DELAY)
RATING = RealNumber(ranges.RATING)
ROPE_THETA = RealNumber(ranges.ROPE_THETA)
