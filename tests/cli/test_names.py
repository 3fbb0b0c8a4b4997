"""Every name and path that a command takes is text and not empty; others are refused in one line at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from llm_trm.cli import main
from llm_trm.cli.options.types import AnyPath, Name
from tests.cli.test_numbers import Option, parameters

#: A question and a puzzle have messages of their own.
TEXTS = {"question", "puzzle"}
OPTIONS: list[Option] = [one for one in parameters() if isinstance(one[2].type, (AnyPath, Name))]
NAMES = [" ".join((*path, parameter.opts[0])) for path, _, parameter in OPTIONS]


def test_every_name_is_of_a_type_that_rejects_an_empty_one() -> None:
    loose = [
        " ".join((*path, parameter.opts[0]))
        for path, _, parameter in parameters()
        if isinstance(parameter.type, (click.Path, click.types.StringParamType))
        and not isinstance(parameter.type, (AnyPath, Name))
        and parameter.name not in TEXTS
    ]
    assert loose == []
    assert {"data sudoku --output", "train lora --data", "eval lm --checkpoint", "data arc paths"} <= {
        name.replace("-o", "--output") for name in NAMES
    }


@pytest.mark.parametrize(("path", "command", "parameter"), OPTIONS, ids=NAMES)
def test_an_empty_name_is_refused_in_one_line(
    path: tuple[str, ...],
    command: click.Command,
    parameter: click.Parameter,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "callback", lambda **_: pytest.fail("work began"))
    option = [parameter.opts[-1]] if isinstance(parameter, click.Option) else []
    for text, words in (("", "is empty"), (" \t", "is empty"), ("a\udcff", "is not text in UTF-8")):
        result = CliRunner().invoke(main, [*path, *option, text])
        assert result.exit_code == 2, (text, result.output)
        assert words in result.stderr and result.stderr.count("\n") == 1, (text, result.output)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="arguments of bytes")
@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", b"\xff", "--model", "arithmetic"),
        ("solve", b"1\xff.."),
        ("train", "lora", "--data", b"a\xff"),
        ("data", "arithmetic", "-o", b"a\xff"),
        (b"\xff",),
        ("env", b"--\xff"),
    ],
)
def test_arguments_in_another_encoding_are_one_line(
    arguments: tuple[str | bytes, ...], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "llm_trm", *arguments]
    done = subprocess.run(command, capture_output=True, check=False, cwd=tmp_path)
    assert done.returncode == 2, done.stderr.decode()
    assert done.stderr.startswith(b"llm-trm: error: ") and done.stderr.count(b"\n") == 1
    assert list(tmp_path.iterdir()) == []
