"""Ranges of the numbers in options, settings and files. Imports no torch, so that help is quick."""

from __future__ import annotations

import numbers
import reprlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Whole:
    """Whole numbers.

    Attributes:
        least, most: The smallest and the largest.
        why: Why a larger number is rejected, for the message.
    """

    least: int
    most: int
    why: str = ""

    def fault(self, value: Any) -> str | None:
        """What is wrong with ``value``, to follow its name in a message; None if it is valid."""
        if not _is(value, numbers.Integral):
            return f"must be a whole number, not {shown(value)}"
        if value < self.least:
            return f"must be at least {self.least}, not {shown(value)}"
        if value > self.most:
            return f"must be at most {self.most}{f' ({self.why})' if self.why else ''}, not {shown(value)}"
        return None


@dataclass(frozen=True)
class Real:
    """Finite numbers between two finite bounds.

    Attributes:
        least, most: The bounds.
        least_open, most_open: Whether the bound itself is excluded.
    """

    least: float
    most: float
    least_open: bool = False
    most_open: bool = False

    def fault(self, value: Any) -> str | None:
        """What is wrong with ``value``, to follow its name in a message; None if it is valid."""
        if not _is(value, numbers.Real):
            return f"must be a number, not {shown(value)}"
        above = self.least < value if self.least_open else self.least <= value
        below = value < self.most if self.most_open else value <= self.most
        if above and below:  # never true for NaN
            return None
        begin, end = "(" if self.least_open else "[", ")" if self.most_open else "]"
        return f"must be in {begin}{self.least:.10g}, {self.most:.10g}{end}, not {shown(value)}"


Range = Whole | Real

_LARGEST = sys.float_info.max

#: repr() of a value from a file may take gigabytes, or nest too deeply for Python's stack.
_QUOTING = reprlib.Repr()
_QUOTING.maxstring = _QUOTING.maxother = _QUOTING.maxlong = 500

#: Numbers of samples, steps and epochs: more than any run has.
COUNT, NO_OR_COUNT = Whole(1, 10**9), Whole(0, 10**9)
#: Numbers of samples, contexts or completions at a time.
BATCH = Whole(1, 2**20)
#: Widths of states and tables, and what divides them: heads, ranks.
WIDTH, NO_OR_WIDTH = Whole(1, 2**20, "no machine can run a wider model"), Whole(0, 2**20)
LAYERS = Whole(1, 1024, "no machine can run a deeper model")
#: Ranks of LoRA: beyond the width of a model, a higher rank gains nothing.
ADAPTER_RANK = Whole(1, 2**14)
#: Lengths of sequences: tokens, cells, latents.
LENGTH, NO_OR_LENGTH = Whole(1, 2**30), Whole(0, 2**30)
#: Rows or columns of a puzzle, and of a generated maze.
GRID_SIDE, MAZE_SIDE = Whole(1, 10_000), Whole(3, 1000)
#: Augmented copies of an ARC task.
SYMMETRIES = Whole(0, 8 * 362_880 - 1, "a grid has no more symmetries")
#: Steps of a maze's path, and clues of a Sudoku.
PATH_STEPS, CLUES = Whole(2, 10**6), Whole(1, 81)
#: Completions of a problem, and tokens to learn from.
GROUP, TOKENS = Whole(2, 2**20), Whole(2, 10**10)
#: Tokens of a vocabulary.
VOCABULARY = Whole(1, 2**26)
#: Latent steps, recursions, supervision steps, tries.
DEPTH, NO_OR_DEPTH = Whole(1, 10_000), Whole(0, 10_000)
#: Operations of an arithmetic problem, and its modulus.
OPERATIONS, MODULUS = Whole(1, 10_000), Whole(2, 10**9)
#: torch's and numpy's generators take more; so do sums of a seed and a number of steps.
SEED = Whole(0, 2**63 - 1)
#: Seeds in older files, when any whole number was allowed.
ANY_SEED = Whole(-(10**30), 10**30)
#: transformers also seeds NumPy's legacy generator.
TRAINER_SEED = Whole(0, 2**32 - 1, "NumPy's generator accepts no larger one")
#: Progress of a run, counts in files, and sums of metrics.
PLACE, AMOUNT, FINITE = Whole(0, 2**63 - 1), Real(0, 2.0**53), Real(-_LARGEST, _LARGEST)
#: Settings of a distributed launch.
PROCESSES, PORT = Whole(1, 2**20), Whole(0, 65_535)
LEARNING_RATE = Real(0, 100, least_open=True)
#: Passes over the data, which may be fractions.
EPOCHS = Real(0, 10**6, least_open=True)
#: Weights of losses and rewards, and weight decay.
WEIGHT = Real(0, 10**6)
CLIP_NORM = Real(0, 10**12, least_open=True)
#: Temperatures, and standard deviations of noise.
SPREAD, NO_OR_SPREAD = Real(0, 10**6, least_open=True), Real(0, 10**6)
SHARE, SHARE_BELOW_ONE = Real(0, 1), Real(0, 1, most_open=True)
SHARE_ABOVE_ZERO = Real(0, 1, least_open=True)
SHARE_WITHIN = Real(0, 1, least_open=True, most_open=True)
#: The held-out fraction of the data, and cosine similarities.
HELD_OUT, COSINE = Real(0, 0.5, least_open=True), Real(-1, 1)
#: Seconds of a benchmark, minutes of tuning, seconds per frame, and the difficulty of a Sudoku.
SECONDS, MINUTES, DELAY = Real(1, 10**7), Real(0, 10**6, least_open=True), Real(0, 60)
RATING = Real(-(10**9), 10**9)
#: The base of rotary frequencies.
ROPE_THETA = Real(0, 10**15, least_open=True)


def shown(value: object, longest: int = 40) -> str:
    """``value`` as a message quotes it: what is long, deep or a huge number is shortened."""
    if isinstance(value, str):
        return repr(value) if len(value) <= longest else f"{value[:longest]!r}..."
    text = _huge(value) or _QUOTING.repr(value)
    return text if len(text) <= longest else f"{text[:longest]}..."


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _huge(value: object) -> str | None:
    # Python refuses to write whole numbers of more than 4300 digits.
    return (
        "a number with thousands of digits" if isinstance(value, int) and value.bit_length() > 9000 else None
    )


def require_in(
    within: Range, name: str, value: Any, error: type[Exception] = ValueError, where: str = ""
) -> None:
    """Raise ``error`` unless ``value`` is ``within``; its message begins with ``where`` and ``name``."""
    if (fault := within.fault(value)) is not None:
        raise error(f"{where}{name} {fault}")


def require_ranges(settings: Any, error: type[Exception] = ValueError, where: str = "") -> None:
    """Raise ``error`` unless the fields of a dataclass have values that their annotations allow.

    Checked are ``Annotated[int, COUNT]`` and the like, ``bool`` and ``Literal[...]``, each also with
    ``| None``, and lists and dicts of such values; other annotations allow anything.

    Args:
        settings: An instance of a dataclass.
        error: Exception to raise; its message names the field.
        where: Start of the message, for example the name of a file and a colon.
    """
    kind: Any = type(settings)
    for name, allowed in _declared(kind):
        if (fault := _fault(allowed, getattr(settings, name))) is not None:
            raise error(f"{where}{name} {fault}")


@cache
def _declared(kind: Any) -> tuple[tuple[str, Any], ...]:
    hints = get_type_hints(kind, include_extras=True)
    return tuple((field.name, hints[field.name]) for field in fields(kind))


def _fault(allowed: Any, value: object) -> str | None:
    origin = get_origin(allowed)
    if origin in (Union, UnionType):
        options = get_args(allowed)
        if value is None and NoneType in options:
            return None
        faults = [_fault(option, value) for option in options if option is not NoneType]
        return None if None in faults else faults[0]
    if origin is Annotated:
        return next((fault for fault in _faults(get_args(allowed)[1:], value)), None)
    if origin is Literal and value not in get_args(allowed):
        return f"must be one of {', '.join(map(repr, get_args(allowed)))}, not {shown(value)}"
    if allowed is bool and not isinstance(value, bool):
        return f"must be true or false, not {shown(value)}"
    if origin is list:
        if not isinstance(value, list):
            return f"must be a list, not {shown(value)}"
        inner = get_args(allowed)[0]
        return next((f"[{place}] {f}" for place, one in enumerate(value) if (f := _fault(inner, one))), None)
    if origin is dict:
        if not isinstance(value, dict):
            return f"must be a mapping, not {shown(value)}"
        inner = get_args(allowed)[1]
        return next((f"[{shown(key)}] {f}" for key, one in value.items() if (f := _fault(inner, one))), None)
    return None


def _faults(ranges: tuple[Any, ...], value: object) -> Iterator[str]:
    for one in ranges:
        if isinstance(one, (Whole, Real)) and (fault := one.fault(value)) is not None:
            yield fault
