"""Settings that are declared once: options, help, config files, records and checks come from the fields."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import click
import pytest
from click.testing import CliRunner, Result

from bench.option_tables import PAGE, page
from bench.report import ROOT
from llm_trm.choices import DeviceName
from llm_trm.cli.bench import BenchSettings
from llm_trm.cli.data import ArithmeticSettings
from llm_trm.cli.data.maze import MazeSettings
from llm_trm.cli.data.sudoku import SudokuSettings
from llm_trm.cli.eval.lm import EvalLanguageModelSettings
from llm_trm.cli.eval.phase2 import EvalPhase2Settings
from llm_trm.cli.eval.puzzle import EvalPuzzleSettings
from llm_trm.cli.generate import GenerateSettings
from llm_trm.cli.group import Group
from llm_trm.cli.memory_plan import PlanOptions
from llm_trm.cli.official import Unrecorded
from llm_trm.cli.options.settings import settings_options
from llm_trm.cli.solve import SolveSettings
from llm_trm.cli.tune import TuneSettings
from llm_trm.data.arithmetic import World
from llm_trm.data.generation_config import DataGenConfig
from llm_trm.errors import InputError
from llm_trm.ranges import COUNT, LEARNING_RATE, SHARE, WIDTH
from llm_trm.settings import Settings, flat, setting, settings_of
from llm_trm.shared_settings import device
from llm_trm.train.lm.config import LanguageModelConfig
from llm_trm.train.lora.config import LoraTrainingConfig, ReasonerSettings
from llm_trm.train.phase1.config import Phase1Config
from llm_trm.train.phase2.config import Phase2Config
from llm_trm.train.phase3.config import Phase3Config
from llm_trm.train.puzzle.config import PuzzleConfig, configure
from llm_trm.train.run import settings as run
from llm_trm.train.run.settings import RunSettings

CONFIGS = (LanguageModelConfig, LoraTrainingConfig, Phase1Config, Phase2Config, Phase3Config, PuzzleConfig)
COMMANDS = (
    *(ArithmeticSettings, MazeSettings, SudokuSettings, DataGenConfig, PlanOptions, Unrecorded),
    *(EvalLanguageModelSettings, EvalPhase2Settings, EvalPuzzleSettings, GenerateSettings, SolveSettings),
    *(BenchSettings, TuneSettings),
)


@dataclass(frozen=True)
class Toy(RunSettings):
    """A run of everything that a setting can be."""

    COMMAND = "toy"

    data: str = setting(..., "Data.")
    output: Path = run.output("runs/toy")
    steps: int = setting(10, "Steps.", COUNT, "-n", "--num-steps", was=("--updates",))
    rate: float | None = setting(None, "Rate.", LEARNING_RATE, unset="a tenth")
    widths: tuple[int, ...] = setting((), "Widths.", WIDTH, metavar="WIDTHS")
    kind: Literal["a", "b"] = setting("a", "Kind.")
    share: float = setting(0.0, "Share.", SHARE, critical=False)
    merge: bool = setting(False, "Merge.")
    keep: bool = setting(True, "Keep.", None, "--keep/--drop")
    world: World = field(default_factory=World)


made: list[Toy] = []


@click.command()
@click.option("--task", default="sudoku")
@settings_options(Toy)
def toy(task: str, given: dict[str, Any]) -> None:
    made.append(Toy(**given))


@dataclass(frozen=True)
class Plain(Settings):
    """Options of a command that records nothing."""

    loud: bool = setting(False, "Loud.")
    source: Path | None = setting(None, "Source.", file="read")
    output: Path | None = setting(None, "File.", None, "-o", "--output", file="write")
    device: DeviceName = device()


@click.command()
@settings_options(Plain, config_file=False)
def plain(given: dict[str, Any]) -> None:
    click.echo(repr(given))


main = Group("llm-trm", commands={"toy": toy, "plain": plain})


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["toy", *arguments])


def parsed(*arguments: str) -> Toy:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return made.pop()


def test_options_become_settings() -> None:
    assert parsed("--data", "x", "--device", "cpu") == Toy("x", device="cpu")
    given = parsed(
        *("--data", "x", "-n", "3", "--rate", "0.5", "--widths", "8,16", "--kind", "b", "--merge", "--drop"),
        *("--operations", "2", "--max-operand", "3", "-o", "there", "--overwrite", "--device", "cpu"),
    )
    assert given == Toy(
        *("x", Path("there"), 3, 0.5, (8, 16), "b"),
        merge=True,
        keep=False,
        world=World(1, 2, 10, 3),
        overwrite=True,
        device="cpu",
    )


def test_a_setting_without_a_default_is_required() -> None:
    result = invoke("-n", "3")
    assert result.exit_code == 2 and "Missing option '--data'" in result.stderr


def test_former_names_are_accepted_and_not_shown() -> None:
    assert parsed("--data", "x", "--updates", "7").steps == 7
    shown = invoke("--help").output
    assert "--updates" not in shown and "-n, --num-steps" in shown
    assert "--updates" not in invoke("--data", "x", "--num-steps", "0").output


def test_help_says_what_the_fields_say() -> None:
    shown = " ".join(invoke("--help").output.split())
    for words in (
        *("Steps. [default: 10; 1<=x<=1000000000]", "Rate. [default: a tenth]", "Kind. [default: a]"),
        *("--merge / --no-merge", "--keep / --drop", "[default: keep]", "Data. [required]", "Widths."),
        *("Share. [default: 0.0; 0<=x<=1]", "--resume Resume", "Largest operand", "--config FILE"),
    ):
        assert words in shown


@pytest.mark.parametrize("suffix", ["json", "toml"])
def test_a_config_file_gives_settings_and_the_command_line_overrides_them(
    suffix: str, tmp_path: Path
) -> None:
    file = tmp_path / f"settings.{suffix}"
    if suffix == "json":
        file.write_text('{"data": "x", "steps": 3, "merge": true, "rate": null, "world": {"modulus": 7}}')
    else:
        file.write_text('data = "x"\nnum-steps = 3\nmerge = true\n[world]\nmodulus = 7\n')
    assert parsed("--config", str(file)) == Toy(
        "x", steps=3, merge=True, world=World(modulus=7), device=parsed("--data", "x").device
    )
    changed = parsed("-n", "4", "--no-merge", "--modulus", "8", "--config", str(file), "--data", "y")
    assert (changed.data, changed.steps, changed.merge, changed.world.modulus) == ("y", 4, False, 8)


def test_a_config_file_may_name_other_parameters_of_the_command(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('data = "x"\ntask = "maze"\n')
    assert parsed("--config", str(tmp_path / "c.toml")).data == "x"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("c.json", '{"data": "x", "colour": 1}', "colour is not a setting of llm-trm toy"),
        ("c.json", '{"data": "x", "world": {"colour": 1}}', "world.colour is not a setting"),
        ("c.json", '{"data": "x", "steps": 0}', "must be at least 1, not 0"),
        ("c.json", '{"data": "x", "steps": 1.5}', "must be a whole number, not 1.5"),
        ("c.json", '{"data": "x", "rate": NaN}', "must be in (0, 100], not nan"),
        ("c.json", '{"data": "x", "kind": "c"}', "'c' is not one of 'a', 'b'"),
        ("c.json", '{"data": "x", "merge": "perhaps"}', "perhaps"),
        ("c.json", '{"data": "x", "steps": null}', "steps must not be null"),
        ("c.json", '{"data": "x", "merge": 1}', "c.json: merge must be true or false, not 1"),
        ("c.json", '{"data": ["x"]}', "c.json: data must be a string, not ['x']"),
        ("c.json", '{"data": "x", "output": {"a": 1}}', "c.json: output must be a string, not {'a': 1}"),
        ("c.json", '{"data": "x", "output": "a\\u0000b"}', "output must not hold the character NUL"),
        ("c.json", '{"data": "x", "widths": 8}', "c.json: widths must be a list, not 8"),
        ("c.json", '{"data": "x", "widths": ["a"]}', "'a' is not a whole number"),
        ("c.json", '{"data": "x", "task": 1}', "c.json: task must be a string, not 1"),
        ("c.json", '{"data": "x", "config": "d.json"}', "config is not a setting of llm-trm toy"),
        ("c.json", '{"data": "x", "help": true}', "help is not a setting of llm-trm toy"),
        ("c.toml", "data = 2026-01-01", "c.toml: data must be a string, not datetime.date(2026, 1, 1)"),
        ("c.json", "[1]", "contains no settings by name"),
        ("c.json", '{"data"', "is not JSON"),
        ("c.toml", "data = ", "is not TOML"),
        ("c.toml", "\udcff", "is not TOML"),
        ("none.toml", None, "does not exist"),
        ("c.json", '{"data": ""}', "the name is empty"),
        ("c.json", '{"data": "x", "output": " "}', "the name is empty"),
        ("c.json", '{"data": "x", "rate": 1e999}', "must be in (0, 100], not inf"),
        ("c.json", '{"data": "x", "steps": 1e9999}', "must be a whole number, not inf"),
        ("c.json", f'{{"data": "x", "steps": {"9" * 5000}}}', "is not JSON (Exceeds the limit"),
        ("c.toml", f"steps = {'9' * 5000}", "is not TOML (Exceeds the limit"),
        ("c.json", f'{{"data": "x", "steps": {"9" * 4000}}}', "must be at most"),
        ("c.json", f'{{"data": "x", "steps": {{"a": {"[" * 900}{"]" * 900}}}}}', "must be a whole number"),
        ("c.json", f'{{"data": "x", "{"k" * 4_000_000}": 1}}', "is not a setting of llm-trm toy"),
        ("c.json", f'{{"data": "x", "steps": "{"k" * 4_000_000}"}}', "is not a whole number"),
        ("c.json", f'{{"data": "x", "kind": "{"k" * 4_000_000}"}}', "is not one of 'a', 'b'"),
        ("c.json", "[" * 100_000, "is not JSON (it nests too deeply)"),
        ("c.toml", "a = " + "[" * 100_000, "is not TOML"),
        ("c.toml", "", "Missing option '--data'"),
        ("c.json", "", "is not JSON"),
        ("c.json", "\0", "is not JSON"),
        ("c.json", '\ufeff\ufeff{"data": "x"}', "is not JSON"),
    ],
)
def test_bad_config_files_get_one_line(name: str, text: str | None, words: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    result = invoke("--config", str(tmp_path / name))
    assert result.exit_code == 2 and words in result.stderr, result.stderr
    assert result.stderr.count("\n") == 1 and len(result.stderr) < 2000


def test_a_config_file_of_windows(tmp_path: Path) -> None:
    (tmp_path / "c.TOML").write_bytes('\ufeffdata = "x"\r\nnum-steps = 3\r\n'.encode())
    assert parsed("--config", str(tmp_path / "c.TOML")).steps == 3


def test_a_folder_is_no_config_file(tmp_path: Path) -> None:
    result = invoke("--config", str(tmp_path))
    assert result.exit_code == 2 and "is a directory" in result.stderr


def test_a_record_reads_back(tmp_path: Path) -> None:
    asked = parsed("--data", "x", "--widths", "8", "--rate", "1", "--modulus", "7", "--resume")
    (tmp_path / "config.json").write_text(json.dumps({**asked.record(), "resume": True}))
    again = parsed("--config", str(tmp_path / "config.json"))
    assert again.record() == asked.record()
    assert asked.resume and not again.resume  # what to do with a run is no setting of it


def test_a_resumed_run_has_the_same_settings() -> None:
    run = Toy("x", rate=0.5)
    before = json.loads(json.dumps(run.record()))
    run.require_same(before)
    Toy("x", rate=0.5, share=0.5, output=Path("moved"), resume=True).require_same(before)
    run.require_same({name: value for name, value in before.items() if name != "merge"})
    run.require_same({**before, "updates": before.pop("steps")})
    with pytest.raises(InputError, match="modulus was 10 and is 7"):
        Toy("x", rate=0.5, world=World(modulus=7)).require_same(before)
    with pytest.raises(InputError, match=r"rate was 0.5 and is None; merge was False and is True"):
        Toy("x", merge=True).require_same(before)


def test_a_table_in_a_record_has_the_name_of_a_setting_in_it() -> None:
    """Older versions recorded only the settings of the reasoner that were given."""
    run = LoraTrainingConfig("a", reasoner=ReasonerSettings(n_layers=1))
    run.require_same({**run.record(), "reasoner": {"n_layers": 1}})
    with pytest.raises(InputError, match=r"\(reasoner was sequence and is None\)"):
        run.require_same({**run.record(), "reasoner": {"n_layers": 1, "reasoner": "sequence"}})


def test_values_are_checked_in_python_too() -> None:
    for wrong in ({"steps": 0}, {"rate": -1.0}, {"widths": (8, 0)}, {"kind": "c"}, {"merge": 1}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            Toy("x", **wrong)
    with pytest.raises(InputError, match="cannot be used together"):
        Toy("x", resume=True, overwrite=True)


def test_a_command_without_a_config_file(tmp_path: Path) -> None:
    runner = CliRunner()
    shown = runner.invoke(main, ["plain", "--help"]).output
    assert "--loud" in shown and "--no-loud" not in shown and "--config" not in shown
    assert runner.invoke(main, ["plain"]).output == "{}\n"
    files = ["--source", "-", "-o", str(tmp_path / "x")]
    given = {"loud": True, "source": Path("-"), "output": tmp_path / "x"}
    assert runner.invoke(main, ["plain", "--loud", *files]).output == f"{given}\n"
    refused = runner.invoke(main, ["plain", "-o", str(tmp_path / "no" / "x")])
    assert refused.exit_code == 2 and "does not exist; create it first" in refused.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("config", (*CONFIGS, *COMMANDS))
def test_every_field_is_a_setting(config: type[Settings]) -> None:
    settings = settings_of(config)
    assert {one.group or one.name for one in settings} == {field.name for field in fields(config)}
    options = [option for one in settings for option in (*one.options, *one.was)]
    assert len(options) == len(set(options))
    for one in settings:
        assert (one.help.endswith(".") and one.help[0].isupper()) or one.help.split()[0].rstrip(
            ":"
        ) in one.choices, one
        if one.kind in (int, float):
            assert one.within is not None, one.name


@pytest.mark.parametrize(
    "config",
    [
        LanguageModelConfig(Path("a"), world=World(2, 3)),
        LoraTrainingConfig(
            "a", trm=Path("b"), reasoner=ReasonerSettings(reasoner="sequence", d_compressed=8)
        ),
        Phase1Config(Path("a"), sweep=(8, 16)),
        Phase2Config(n_heads=2),
        Phase3Config(world=World(1, 2), kl=0.0),
        configure("paper", "maze", data=Path("a"), output=Path("b")),
    ],
    ids=lambda config: type(config).__name__,
)
def test_the_record_of_a_training_holds_all_of_its_settings(config: Settings) -> None:
    values, unknown = flat(type(config), json.loads(json.dumps(config.record())))
    assert unknown == []
    assert set(values) == {one.name for one in settings_of(type(config)) if not one.action}


def test_the_page_of_options_is_up_to_date() -> None:
    """``python -m bench.option_tables`` writes it."""
    assert (ROOT / PAGE).read_text(encoding="utf-8") == page()
