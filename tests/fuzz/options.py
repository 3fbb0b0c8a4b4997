"""Every option of every command with nonsense: on the command line, and from a config file."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import click

from tests.fuzz.cases import Outcome
from tests.fuzz.children import Children
from tests.fuzz.judging import judge, shown
from tests.fuzz.mutations import copy_of
from tests.fuzz.nonsense import Nonsense, Parameter, nonsense, parameters, plausible
from tests.fuzz.world import BASES, arguments

#: Inserted anywhere.
_STRAY = ("--", "-x", "--no-such", "", "--help", "-o", "\ufeff")


class Options:
    """The part of the options.

    Args:
        children: Server of the processes that commands run in.
        world: What the commands read, from :func:`tests.fuzz.world.make`.
        folder: Folder for the files of a case.
        seed: Decides the order of the nonsense.
    """

    def __init__(self, children: Children, world: Path, folder: Path, seed: int) -> None:
        self._children, self._world, self._folder = children, world, folder
        self._parameters = parameters()
        assert {one.command for one in self._parameters} == set(BASES), "every command needs valid arguments"
        chance = random.Random(seed)
        chance.shuffle(self._parameters)
        self._nonsense = [chance.sample(found, len(found)) for found in map(nonsense, self._parameters)]

    def __call__(self, number: int, chance: random.Random) -> Outcome:
        """Run a case: each parameter in turn, twice with its next nonsense, then along with others."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir()
        _furnish(self._folder)
        turn, place = divmod(number, len(self._parameters))
        one, (turns, kind) = self._parameters[place], divmod(turn + place, 3)
        line, refuse = arguments(one.command, self._world), False
        if kind == 2:
            line += self._combined(one, chance)
        else:
            found = self._nonsense[place]
            value = found[(2 * turns + kind) % len(found)]
            line, refuse = self._with(value, one, line), value.refuse
        if chance.random() < 0.05:
            line.insert(chance.randrange(len(line)), chance.choice(_STRAY))
            refuse = False
        if "--write-card" in line:
            # It writes into the checkpoint.
            copy_of(self._world / "lora", self._folder / "lora")
            line = [word.replace(str(self._world / "lora"), "lora") for word in line]
        ended = self._children.run("tests.fuzz.child:command", line, folder=self._folder)
        happened, fault = judge(one.command, ended, refuse=refuse)
        return Outcome(f"llm-trm {shown(line)}", happened, fault)

    def _with(self, what: Nonsense, one: Parameter, line: list[str]) -> list[str]:
        """A command line with nonsense."""
        parameter, value = one.parameter, what.value
        if what.in_file:
            (self._folder / "config.json").write_text(f'{{"{parameter.name}": {value}}}')
            # The command line takes precedence over the file; without a limit, the work would be long.
            kept = line if value == "null" else _without(parameter, line)
            return [*kept, "--config", "config.json"]
        if one.is_flag:
            name = parameter.opts[-1]
            return [*line, *{"twice": [name, name], "cut": [name[:-1]]}.get(value, [f"{name}{value}"])]
        return [*line, *_given(parameter, value)]

    def _combined(self, one: Parameter, chance: random.Random) -> list[str]:
        """Several options of the command, each with a value that it might accept."""
        others = [other for other in self._parameters if other.command == one.command]
        words = []
        for other in [one, *chance.sample(others, min(len(others), chance.randint(1, 3)))]:
            if other.is_flag:
                words += [chance.choice([*other.parameter.opts, *other.parameter.secondary_opts])]
            elif isinstance(other.parameter, click.Option):
                words += _given(other.parameter, plausible(other, chance))
        return words


def _given(parameter: click.Parameter, value: str) -> list[str]:
    values = [value] * max(parameter.nargs, 1)
    if not isinstance(parameter, click.Option):
        return values
    name = parameter.opts[-1]
    return [f"{name}={value}"] if name.startswith("--") and len(values) == 1 else [name, *values]


def _without(parameter: click.Parameter, line: list[str]) -> list[str]:
    at = next((at for at, word in enumerate(line) if word in parameter.opts), None)
    flag = isinstance(parameter, click.Option) and parameter.is_flag
    return line if at is None else line[:at] + line[at + 1 + (0 if flag else parameter.nargs) :]


def _furnish(folder: Path) -> None:
    (folder / "full").mkdir()
    (folder / "full" / "mine.txt").write_text("mine\n")
    (folder / "empty").mkdir()
    (folder / "file").write_text("mine\n")
    (folder / "empty.jsonl").touch()
    (folder / "bytes.jsonl").write_bytes(bytes(range(256)))
    (folder / "loop").symlink_to("loop")
    (folder / "x.json").write_text(json.dumps({"mine": True}))
