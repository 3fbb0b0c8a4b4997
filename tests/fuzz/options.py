"""Every option of every command with nonsense: on the command line, and from a config file."""

from __future__ import annotations

import json
import random
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from llm_trm.cli import main
from llm_trm.cli.options.types import Grid, RealNumber, WholeNumber, WholeNumbers
from tests.fuzz.cases import Outcome, fault_of_message
from tests.fuzz.children import Children, Ended
from tests.fuzz.world import BASES, arguments

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
#: Codes that a command may end with; bench, solve and tune document 1.
_CODES = {0, 2, 130, 143, -15}
_WITH_ONE = ("bench", "solve", "tune")


@dataclass(frozen=True)
class _Parameter:
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


def _commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    if not isinstance(command, click.Group):
        yield " ".join(path), command
        return
    context = click.Context(command)
    for name in command.list_commands(context):
        found = command.get_command(context, name)
        assert found is not None
        yield from _commands(found, (*path, name))


def parameters() -> list[_Parameter]:
    """The options and arguments of all commands, except ``--help`` and ``--config``."""
    found = []
    for name, command in _commands(main):
        configurable = any("--config" in one.opts for one in command.params)
        found += [_Parameter(name, one, configurable) for one in command.params if "--config" not in one.opts]
    return found


class Options:
    """The part of the options.

    Args:
        children: Server of the processes that commands run in.
        world: What the commands read, from :func:`tests.fuzz.world.make`.
        folder: Folder for the files of a case.
    """

    def __init__(self, children: Children, world: Path, folder: Path) -> None:
        self._children, self._world, self._folder = children, world, folder
        self._parameters = parameters()
        assert {one.command for one in self._parameters} == set(BASES), "every command needs valid arguments"

    def __call__(self, number: int, chance: random.Random) -> Outcome:
        """Run a case: each parameter in turn, with a random kind of nonsense."""
        # A stride that has no divisor in common visits every parameter.
        one = self._parameters[number * 101 % len(self._parameters)]
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir()
        _furnish(self._folder)
        kinds = [self._nonsense, self._nonsense, self._combined]
        if one.configurable and isinstance(one.parameter, click.Option):
            kinds.append(self._configured)
        more, refuse = chance.choice(kinds)(one, chance)
        line = [*arguments(one.command, self._world), *more]
        if chance.random() < 0.1:
            line = line[:]
            line.insert(
                chance.randrange(len(line)), chance.choice(("--", "-x", "--no-such", "", "--help", "-o"))
            )
            refuse = False
        ended = self._children.run("tests.fuzz.child:command", line, folder=self._folder)
        kind, fault = judge(one.command, ended, refuse=refuse)
        return Outcome(f"llm-trm {shown(line)}", kind, fault)

    def _nonsense(self, one: _Parameter, chance: random.Random) -> tuple[list[str], bool]:
        """One value of the wrong kind."""
        if one.is_flag:
            name = chance.choice([*one.parameter.opts, *one.parameter.secondary_opts])
            return chance.choice(([f"{name}=1"], [name], [name, name], [name[:-1]])), False
        value, refuse = self._value(one, chance)
        return _given(one.parameter, value), refuse

    def _value(self, one: _Parameter, chance: random.Random) -> tuple[str, bool]:
        kind = one.parameter.type
        if one.is_number:
            value = chance.choice((*_NO_NUMBERS, *_NUMBERS_AT_EDGES))
            return value, value in _NO_NUMBERS
        if isinstance(kind, click.Choice):
            return chance.choice(_NO_CHOICES), True
        if isinstance(kind, click.Path):
            value = chance.choice(_STRANGE_PATHS)
            return value, value == ""
        return chance.choice(_TEXTS), False

    def _combined(self, one: _Parameter, chance: random.Random) -> tuple[list[str], bool]:
        """Several options of the command, each with a value that it might accept."""
        others = [other for other in self._parameters if other.command == one.command]
        chosen = [one, *chance.sample(others, min(len(others), chance.randint(1, 3)))]
        more = []
        for other in chosen:
            if other.is_flag:
                more += [chance.choice([*other.parameter.opts, *other.parameter.secondary_opts])]
            elif isinstance(other.parameter, click.Option):
                more += _given(other.parameter, _plausible(other, chance))
        return more, False

    def _configured(self, one: _Parameter, chance: random.Random) -> tuple[list[str], bool]:
        """One value of the wrong kind from a config file."""
        value = chance.choice(_VALUES)
        name = str(one.parameter.name)
        (self._folder / "config.json").write_text(f'{{"{name}": {value}}}')
        # What the valid arguments give takes precedence over the file.
        line = BASES[one.command].split()
        given = any(option in line for option in one.parameter.opts)
        never = one.is_number and value in ("NaN", "Infinity", "-Infinity", "1e400", '"nan"')
        return ["--config", "config.json"], never and not given


def judge(command: str, ended: Ended, *, refuse: bool) -> tuple[str, str | None]:
    """What happened to a command, and what is wrong with that.

    Args:
        refuse: Whether the arguments must be refused.
    """
    if ended.status is None:
        return "hung", "it does not end, even after SIGTERM"
    if "Traceback (most recent call last)" in ended.err:
        return "traceback", f"a traceback: {last_line(ended.err)}"
    found = ended.value or {"code": ended.status, "faults": []}
    code, faults = found["code"], found["faults"]
    if code not in _CODES and not (code == 1 and command in _WITH_ONE):
        return "other code", f"exit code {code!r}: {last_line(ended.err)}"
    if code == 2:
        errors = [line for line in ended.err.split("\n") if line.startswith("llm-trm: error:")]
        message = ended.err[ended.err.find("llm-trm: error:") :] if errors else ""
        fault = fault_of_message(message)
        return "refused", (f"{fault}: {message[:200]!a}" if fault else "; ".join(faults) or None)
    if refuse:
        return "accepted", "it must be refused"
    return "stopped" if ended.stopped else "accepted", "; ".join(faults) or None


def shown(line: list[str]) -> str:
    """A command line in ASCII, with long words cut."""
    words = [word if len(word) < 150 else f"{word[:40]}...({len(word)} characters)" for word in line]
    return shlex.join(words).encode(errors="backslashreplace").decode()


def last_line(text: str) -> str:
    """The last line of an output, in ASCII."""
    lines = text.strip().split("\n")
    return lines[-1][:200].encode(errors="backslashreplace").decode()


def _given(parameter: click.Parameter, value: str) -> list[str]:
    values = [value] * max(parameter.nargs, 1)
    if not isinstance(parameter, click.Option):
        return values
    name = parameter.opts[-1]
    return [f"{name}={value}"] if name.startswith("--") and len(values) == 1 else [name, *values]


def _plausible(one: _Parameter, chance: random.Random) -> str:
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


def _furnish(folder: Path) -> None:
    (folder / "full").mkdir()
    (folder / "full" / "mine.txt").write_text("mine\n")
    (folder / "empty").mkdir()
    (folder / "file").write_text("mine\n")
    (folder / "empty.jsonl").touch()
    (folder / "bytes.jsonl").write_bytes(bytes(range(256)))
    (folder / "loop").symlink_to("loop")
    (folder / "x.json").write_text(json.dumps({"mine": True}))
