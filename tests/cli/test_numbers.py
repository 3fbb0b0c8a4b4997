"""Every number that a command takes is finite and within bounds; others are refused in one line at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from llm_trm.cli import main
from llm_trm.cli.options.types import Grid, RealNumber, WholeNumber, WholeNumbers
from tests.commands import commands

Option = tuple[tuple[str, ...], click.Command, click.Parameter]

_NOT_A_NUMBER = ("", " ", "x", "1e", "nan", "NaN", "inf", "-inf", "Infinity", "1e400", "-1e400", "0x10")
_OUT_OF_BOUNDS = ("-1", "1000000000000", "100000000000000000000", "9" * 5000)


def parameters() -> Iterator[Option]:
    for path, command in commands():
        for parameter in command.params:
            yield path, command, parameter


def _kinds(kind: click.ParamType) -> tuple[click.ParamType, ...]:
    return tuple(kind.types) if isinstance(kind, click.Tuple) else (kind,)


OURS = (WholeNumber, RealNumber, WholeNumbers, Grid)
OPTIONS = [one for one in parameters() if isinstance(one[2].type, OURS)]
NAMES = [" ".join((*path, parameter.opts[0])) for path, _, parameter in OPTIONS]


def test_all_commands_are_walked() -> None:
    assert len(OPTIONS) > 150
    assert {"train lora --learning-rate", "bench --budget", "data arithmetic --num-samples"} <= set(NAMES)


def test_every_number_is_of_a_type_with_finite_bounds() -> None:
    builtin = (click.types.IntParamType, click.types.FloatParamType)
    loose = [
        " ".join((*path, parameter.opts[0]))
        for path, _, parameter in parameters()
        for kind in _kinds(parameter.type)
        if isinstance(kind, builtin) and not isinstance(kind, OURS)
    ]
    assert loose == []


def test_defaults_are_within_their_own_bounds() -> None:
    for _, command, parameter in OPTIONS:
        default = parameter.get_default(click.Context(command))
        if isinstance(default, (int, float, tuple)):
            assert parameter.type.convert(default, parameter, None) == default


@pytest.mark.parametrize(("path", "command", "parameter"), OPTIONS, ids=NAMES)
def test_nonsense_is_refused_in_one_line(
    path: tuple[str, ...],
    command: click.Command,
    parameter: click.Parameter,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "callback", lambda **_: pytest.fail("work began"))
    within = getattr(parameter.type, "within", None)
    for text in (*_NOT_A_NUMBER, *_OUT_OF_BOUNDS):
        if text in _OUT_OF_BOUNDS[:3] and within is not None and within.fault(int(text)) is None:
            continue  # a seed of 10^12 is one
        name = parameter.opts[0]
        values = [text] * parameter.nargs
        given = [f"{name}={text}"] if name.startswith("--") and parameter.nargs == 1 else [name, *values]
        result = CliRunner().invoke(main, [*path, *given])
        assert result.exit_code == 2, (text, result.output)
        assert result.output.count("\n") == 1 and len(result.output) < 300, (text, result.output)
        assert any(name in result.output for name in parameter.opts), (text, result.output)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("bench --budget nan", "must be in [1, 10000000], not nan"),
        ("train lm --learning-rate inf", "must be in (0, 100], not inf"),
        ("train lm --seed 4294967296", "NumPy's generator accepts no larger one"),
        ("generate --seed -1 1+1", "must be at least 0, not -1"),
        ("data sudoku --seed 9223372036854775808", "must be at most 9223372036854775807"),
        ("data arithmetic --operations 1000000", "must be at most 10000"),
        ("train phase1 --sweep 1,2,nan", "'nan' is not a whole number"),
        ("train phase1 --sweep 16,,32", "'' is not a whole number"),
        ("train phase1 --sweep 16,-1", "must be at least 1, not -1"),
        ("train phase1 --sweep 16,100000000000", "must be at most 1048576"),
        ("import official x -o y --grid 9xnan", "'9xnan' is not a grid"),
        ("import official x -o y --grid 0x9", "must be at least 1, not 0"),
        ("import official x -o y --grid 9x100000000000", "must be at most 10000"),
        ("train puzzle --d-model 100000000000", "no machine can run a wider model"),
        ("train puzzle --layers 100000000", "no machine can run a deeper model"),
        ("data arc x --augment 1000000000", "a grid has no more symmetries"),
    ],
)
def test_the_line_says_what_may_be_given(arguments: str, said: str) -> None:
    result = CliRunner().invoke(main, arguments.split())
    assert result.exit_code == 2
    assert said in result.output
    assert result.output.count("\n") == 1


@pytest.mark.parametrize("seed", ["0", "1000000000000", "9223372036854775807"])
def test_large_seeds_are_seeds(seed: str) -> None:
    result = CliRunner().invoke(main, ["data", "arithmetic", "--num-samples", "2", "--seed", seed])
    assert result.exit_code == 0, result.output
    assert result.output.count("\n") == 2


def test_lists_and_grids_are_read() -> None:
    assert WholeNumbers(RANGE).convert("8, 16,8", None, None) == (8, 16)
    assert Grid().convert("9x12", None, None) == (9, 12)


RANGE = next(parameter.type.within for _, _, parameter in OPTIONS if "--sweep" in parameter.opts)
