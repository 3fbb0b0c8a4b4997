"""Former names of options: still accepted, and not shown by the help."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from llm_trm.cli import main

RENAMED = [
    ("datagen", "--dataset", "--data", "gsm8k"),
    ("datagen", "--fresh", "--overwrite", None),
    ("eval lm", "--dataset", "--data", "gsm8k"),
    ("eval puzzle", "--samples", "--num-samples", "5"),
    ("eval puzzle", "--json", "--output", "figures.json"),
    ("eval puzzle", "--inference-steps", "--max-steps", "7"),
    ("solve", "--inference-steps", "--max-steps", "7"),
    ("solve", "--file", "--input", "puzzles.txt"),
    ("generate", "--file", "--input", "questions.txt"),
    ("bench", "--hidden-size", "--d-model", "64"),
    ("bench", "--batch", "--batch-size", "2"),
    ("tune", "--hidden-size", "--d-model", "64"),
    ("tune", "--batch", "--batch-size", "2"),
    ("train phase1", "--held-out", "--val-fraction", "0.2"),
    ("train phase3", "--dataset", "--data", "gsm8k"),
    ("train phase3", "--gradient-accumulation", "--accumulation", "2"),
    ("env", "--latents", "--num-latents", "16"),
]


def found(path: str) -> click.Command:
    command: click.Command = main
    for name in path.split():
        assert isinstance(command, click.Group)
        inner = command.get_command(click.Context(command), name)
        assert inner is not None
        command = inner
    return command


@pytest.mark.parametrize(("path", "former", "option", "value"), RENAMED)
def test_a_former_name_is_accepted_and_hidden(path: str, former: str, option: str, value: str | None) -> None:
    command = found(path)
    given = [] if value is None else [value]
    # Only parses: neither required options nor the files are needed.
    parsed = [
        command.make_context(path, [name, *given], resilient_parsing=True).params for name in (former, option)
    ]
    assert parsed[0] == parsed[1] != command.make_context(path, [], resilient_parsing=True).params
    shown = CliRunner().invoke(main, [*path.split(), "--help"]).output.split()
    assert option in {word.strip(",") for word in shown}
    assert former not in {word.strip(",") for word in shown}


@pytest.mark.parametrize("path", ["tune", "eval puzzle", "eval lm", "eval phase2", "generate"])
def test_the_short_form_of_output(path: str) -> None:
    context = found(path).make_context(path, ["-o", "file"], resilient_parsing=True)
    assert str(context.params["output"]) == "file"
