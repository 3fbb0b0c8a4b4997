"""The examples in the help of the commands are command lines that parse."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from llm_trm.cli import main
from tests.commands import commands


def _examples(command: click.Command) -> Iterator[str]:
    for line in re.sub(r"\\\n\s*", "", command.help or "").splitlines():
        if line.strip().startswith("llm-trm ") and not line.rstrip().endswith("..."):
            # Remarks are two or more blanks away; a shell would redirect the output.
            yield re.split(r"(?<=\S) {2,}| > ", line.strip())[0]


# The help of the other groups lists commands, not examples.
EXAMPLES = [line for command in (main, *(one for _, one in commands())) for line in _examples(command)]


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
