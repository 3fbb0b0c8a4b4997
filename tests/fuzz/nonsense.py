"""The parameters of all commands, and values that are nonsense for them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import click

from llm_trm.cli.options.types import Grid, RealNumber, WholeNumber, WholeNumbers
from tests.commands import commands

_NUMBERS = (WholeNumber, RealNumber, WholeNumbers, Grid)
_SURROGATE, _LONG = "x\udcff", "x" * 100_000
#: No number: nothing may accept them.
_NO_NUMBERS = (
    "",
    " ",
    "x",
    "nan",
    "-nan",
    "inf",
    "-inf",
    "1e400",
    "1_",
    "0x10",
    "9" * 400,
    _SURROGATE,
    _LONG,
)
_NUMBERS_AT_EDGES = (
    "-1",
    "0",
    "1",
    "1e-300",
    "1_0",
    "9223372036854775808",
    "-9223372036854775809",
    "0.1",
    "-0.0",
)
_NO_CHOICES = ("", " ", "x", "None", "nan", _SURROGATE, _LONG)
#: Paths in the folder of a case; see _furnish.
_PATHS = (
    "",
    "full",
    "empty",
    "file",
    "file/in",
    "missing/in",
    "loop",
    ".",
    "..",
    "/",
    "/proc/nowhere",
    "/dev/full",
)
_STRANGE_PATHS = (
    *_PATHS,
    "-",
    "~",
    "x\ny",
    "-x",
    " ",
    _SURROGATE,
    _LONG,
    "a/" * 3000,
    "empty.jsonl",
    "bytes.jsonl",
)
_TEXTS = (
    "",
    " ",
    ",",
    "x",
    "a/b",
    "a/b:c",
    "1+1",
    "1" * 300,
    "nan",
    "\ufeff1+1",
    "<think>",
    "{}",
    *_STRANGE_PATHS,
)
#: In a config file, as JSON.
_VALUES = (
    *("null", "true", "[]", "{}", '""', '"x"', '"nan"', "NaN", "Infinity", "-Infinity", "1e400", "-1", "0"),
    *("[null]", '["x"]', "[[]]", '{"x": 1}', '"\\u0000"', '"\\ud800"', "9" * 400, "9" * 5000, "1.5", '"1"'),
    *("[" * 5000 + "]" * 5000, '"' + _LONG + '"'),
)
_NOT_FINITE = ("NaN", "Infinity", "-Infinity", "1e400", '"nan"')


@dataclass(frozen=True)
class Parameter:
    command: str
    parameter: click.Parameter
    configurable: bool

    @property
    def is_number(self) -> bool:
        kind = self.parameter.type
        return isinstance(kind, _NUMBERS) or (
            isinstance(kind, click.Tuple) and all(isinstance(one, _NUMBERS) for one in kind.types)
        )

    @property
    def is_flag(self) -> bool:
        return isinstance(self.parameter, click.Option) and self.parameter.is_flag


def parameters() -> list[Parameter]:
    """The options and arguments of all commands, except ``--help``."""
    found = []
    for path, command in commands():
        configurable = any("--config" in one.opts for one in command.params)
        found += [Parameter(" ".join(path), one, configurable) for one in command.params]
    return found


@dataclass(frozen=True)
class Nonsense:
    """A value for a parameter.

    Attributes:
        value: The words on the command line; or JSON in a config file.
        in_file: Whether it is in a config file.
        refuse: Whether it must be refused.
    """

    value: str
    in_file: bool
    refuse: bool


def nonsense(one: Parameter) -> list[Nonsense]:
    """All nonsense for a parameter."""
    kind = one.parameter.type
    if one.is_flag:
        given: tuple[str, ...] = ("", "=1", "twice", "cut")
        refused: tuple[str, ...] = ("=1",)
    elif one.is_number:
        given, refused = (*_NO_NUMBERS, *_NUMBERS_AT_EDGES), _NO_NUMBERS
    elif isinstance(kind, click.Choice):
        given = refused = _NO_CHOICES
    elif isinstance(kind, click.Path):
        given, refused = _STRANGE_PATHS, ("",)
    else:
        given, refused = _TEXTS, ()
    found = [Nonsense(value, False, value in refused) for value in given]
    if one.configurable and one.parameter.name != "config" and isinstance(one.parameter, click.Option):
        found += [Nonsense(value, True, one.is_number and value in _NOT_FINITE) for value in _VALUES]
    return found


def plausible(one: Parameter, chance: random.Random) -> str:
    """A value that the option might accept."""
    kind: Any = one.parameter.type
    if isinstance(kind, click.Choice):
        return str(chance.choice(list(kind.choices)))
    if isinstance(kind, WholeNumbers):
        return chance.choice(("1", "2,4", "8"))
    if isinstance(kind, Grid):
        return chance.choice(("1x1", "4x4", "2x8"))
    if isinstance(kind, RealNumber):
        return chance.choice(("0", "0.5", "1", "1e-3", "10"))
    if one.is_number:
        return chance.choice(("0", "1", "2", "3", "8"))
    if isinstance(kind, click.Path):
        return chance.choice(_PATHS)
    return chance.choice(("arithmetic", "gsm8k", "operations", "eager", "no-think", "chat", "x.png"))
