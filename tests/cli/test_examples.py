"""The examples in the help of the commands are command lines that parse."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from llm_trm.cli import main


def _examples(command: click.Command) -> Iterator[str]:
    # The help of a group below the first lists commands, not examples.
    listing = isinstance(command, click.Group) and command is not main
    text = "" if listing else re.sub(r"\\\n\s*", "", command.help or "")
    for line in text.splitlines():
        if line.strip().startswith("llm-trm ") and not line.rstrip().endswith("..."):
            # Remarks are two or more blanks away; a shell would redirect the output.
            yield re.split(r"(?<=\S) {2,}| > ", line.strip())[0]
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            inner = command.get_command(click.Context(command), name)
            assert inner is not None
            yield from _examples(inner)


EXAMPLES = list(_examples(main))


def test_examples_are_found() -> None:
    assert len(EXAMPLES) > 60
    assert "llm-trm env --json" in EXAMPLES


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_parses(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command: click.Command = main
    words = shlex.split(example)[1:]
    while isinstance(command, click.Group):
        inner = command.get_command(click.Context(command), words.pop(0))
        assert inner is not None
        command = inner
    if "--help" not in words:
        command.make_context(example, words)
