"""What a command writes: never over what exists, never half, and never with leftovers."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from llm_trm import files
from llm_trm.cli import main
from llm_trm.cli.options.output import output_file
from llm_trm.models.puzzle.official import write_official
from llm_trm.models.puzzle.official_config import write_config
from llm_trm.models.puzzle.paper import PuzzleTRM, PuzzleTRMConfig, save_puzzle_model
from tests.commands import commands

PUZZLE = "1... ..3. .4.. ...2"
ARITHMETIC = ("--model", "arithmetic", "--device", "cpu")
NOWHERE = "no/such/place"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="llm-trm")


def refusal(result: Result) -> str:
    """The one line on stderr of a refused command."""
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("llm-trm: ")]
    return line


def content(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file may become larger than ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands read: 4x4 Sudokus, a puzzle model, an official checkpoint, an ARC task."""
    folder = tmp_path_factory.mktemp("world")
    sizes = ("--size", 4, "--num-samples", 6, "--test-samples", 3)
    assert run("data", "sudoku", *sizes, "-o", folder / "sudoku").exit_code == 0
    config = PuzzleTRMConfig(
        vocab_size=6, seq_len=16, d_model=8, n_layers=1, n_heads=1, puzzle_len=0, puzzle_dim=0,
        n_latent_steps=1, n_deep_recursions=1, max_steps=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = PuzzleTRM(config)
    facts = {"task": "sudoku", "rows": 4, "columns": 4}
    for name in ("model", "official"):
        (folder / name).mkdir()
    save_puzzle_model(model, folder / "model", **facts)
    write_official(model, folder / "official" / "step_1", facts)
    write_config(folder / "official" / "step_1", config, facts)
    pairs = [{"input": [[number, 0], [2, 1]], "output": [[number]]} for number in (1, 2, 3)]
    (folder / "task.json").write_text(json.dumps({"train": pairs[:2], "test": pairs[2:]}))
    return folder


SUDOKU = ("data", "sudoku", "--size", 4, "--num-samples", 6, "--test-samples", 3, "-o")
MAZE = ("data", "maze", "--size", 5, "--num-samples", 4, "--test-samples", 2, "-o")
#: Each command with the place of what it writes last: a file, or a folder.
FILES: dict[str, Callable[[Path], tuple[object, ...]]] = {
    "arithmetic": lambda world: ("data", "arithmetic", "--num-samples", 20, "-o"),
    "eval lm": lambda world: (*("eval", "lm", *ARITHMETIC, "--mode", "think", "--num-samples", 2, "-o"),),
    "eval lm --plot": lambda world: (
        *("eval", "lm", *ARITHMETIC, "--mode", "think", "--num-samples", 2, "--plot"),
    ),
    "eval puzzle": lambda world: (
        *("eval", "puzzle", "--checkpoint", world / "model", "--data", world / "sudoku", "-o"),
    ),
    "solve": lambda world: (*("solve", PUZZLE, "--checkpoint", world / "model", "--delay", "0.01", "--gif"),),
    "bench": lambda world: ("bench", "--quick", "--backends", "eager", "--mode", "forward", "--plot"),
    "export": lambda world: ("export", "official", world / "model", "-o"),
}
FOLDERS: dict[str, Callable[[Path], tuple[object, ...]]] = {
    "sudoku": lambda world: SUDOKU,
    "maze": lambda world: MAZE,
    "arc": lambda world: ("data", "arc", world / "task.json", "--augment", 2, "-o"),
    "import": lambda world: ("import", "official", world / "official" / "step_1", "-o"),
    "datagen": lambda world: ("datagen", *ARITHMETIC, "--num-samples", 4, "-o"),
}
COMMANDS = FILES | FOLDERS


@pytest.fixture(autouse=True)
def _command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["llm-trm", "command"])  # a claim and an interruption name it


def name_of(command: str) -> str:
    return "out" if command in FOLDERS else "out.png"


@pytest.mark.parametrize("command", FILES)
def test_a_file_is_replaced_only_with_overwrite(command: str, world: Path, tmp_path: Path) -> None:
    arguments = (*FILES[command](world), tmp_path / "out.png")
    (tmp_path / "out.png").write_text("mine")
    line = refusal(run(*arguments))
    assert f"{tmp_path / 'out.png'} already exists: replace it with --overwrite" in line
    assert content(tmp_path) == {"out.png": b"mine"}
    assert run(*arguments, "--overwrite").exit_code in (0, 1)  # 1: the answer of solve is wrong
    written = content(tmp_path)
    assert written.keys() - {"all_config.yaml"} == {"out.png"}
    assert written["out.png"] not in (b"mine", b"")


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "1+1", "--checkpoint", NOWHERE, "-o"),
        ("eval", "lm", "--checkpoint", NOWHERE, "-o"),
        ("eval", "lm", "--checkpoint", NOWHERE, "--plot"),
        ("eval", "phase2", "--checkpoint", NOWHERE, "--data", NOWHERE, "-o"),
        ("eval", "puzzle", "--checkpoint", NOWHERE, "-o"),
        ("solve", PUZZLE, "--checkpoint", NOWHERE, "--gif"),
        ("export", "official", NOWHERE, "-o"),
    ],
)
def test_an_existing_file_is_refused_before_anything_is_read(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "out.png").write_text("mine")
    assert "already exists: replace it with --overwrite" in refusal(run(*arguments, tmp_path / "out.png"))


def test_every_command_that_writes_can_overwrite() -> None:
    lacking = []
    for path, command in commands():
        names = {parameter.name for parameter in command.params}
        writes = any(parameter.callback is output_file for parameter in command.params)
        folder = "output" in names and path != ("tune",)  # which continues its table
        if (writes or folder) and "overwrite" not in names:
            lacking.append(" ".join(path))
    assert not lacking


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing(
    command: str, number: int, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(temporary: Path, path: Path) -> None:
        signal.raise_signal(number)
        pytest.fail("the signal was ignored")

    monkeypatch.setattr(files, "publish", stopped)
    before = content(world)
    result = run(*COMMANDS[command](world), tmp_path / name_of(command))
    assert result.exit_code == 128 + number, result.output
    assert result.stderr.splitlines()[-1].startswith("llm-trm: ")
    assert content(tmp_path) == {}
    assert content(world) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_leaves_nothing(command: str, world: Path, tmp_path: Path) -> None:
    arguments = (*COMMANDS[command](world), tmp_path / name_of(command))
    with full_disk(150):
        result = run(*arguments)
    line = refusal(result)
    assert "File too large" in line or "could not be written completely" in line, line
    # torch.save names no file.
    assert str(tmp_path) in line or command == "export"
    assert content(tmp_path) == {}


@pytest.mark.parametrize("command", [*FILES, "sudoku", "maze", "arc", "import"])
def test_a_full_disk_keeps_what_was_there(command: str, world: Path, tmp_path: Path) -> None:
    output = tmp_path / name_of(command)
    arguments = (*COMMANDS[command](world), output)
    assert run(*arguments).exit_code in (0, 1)
    before = content(tmp_path)
    with full_disk(150):
        refusal(run(*arguments, "--overwrite"))
    assert content(tmp_path) == before


def test_a_failed_export_leaves_no_settings_of_a_missing_checkpoint(world: Path, tmp_path: Path) -> None:
    arguments = ("export", "official", world / "model", "-o", tmp_path / "step_1")
    with full_disk((world / "official" / "all_config.yaml").stat().st_size + 500):
        refusal(run(*arguments))
    assert content(tmp_path) == {}
    assert run(*arguments).exit_code == 0
    assert content(tmp_path).keys() == {"step_1", "all_config.yaml"}


@pytest.mark.parametrize("command", ["sudoku", "maze", "arc"])
def test_puzzles_are_replaced_only_with_overwrite(command: str, world: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arc = (*FOLDERS["arc"](world), output)
    assert run(*arc).exit_code == 0
    (output / "notes.txt").write_text("mine")
    before = content(output)
    arguments = (*FOLDERS[command](world), output)
    line = refusal(run(*arguments))
    assert f"{output} already has puzzles (dataset.json): replace them with --overwrite" in line
    assert content(output) == before
    assert run(*arguments, "--overwrite").exit_code == 0
    written = {"dataset.json", "train.safetensors", "test.safetensors", "notes.txt"}
    assert content(output).keys() == written | ({"arc.json"} if command == "arc" else set())
    assert json.loads((output / "dataset.json").read_text())["task"] == command


def test_a_file_of_the_user_in_a_folder_of_another_task_stays(tmp_path: Path) -> None:
    assert run(*SUDOKU, tmp_path).exit_code == 0
    (tmp_path / "arc.json").write_text("mine")
    assert run(*MAZE, tmp_path, "--overwrite").exit_code == 0
    assert (tmp_path / "arc.json").read_text() == "mine"


def test_an_import_replaces_a_model_but_no_run(world: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = (*FOLDERS["import"](world), output)
    assert run(*arguments).exit_code == 0
    (output / "notes.txt").write_text("mine")
    before = content(output)
    assert "is not empty: replace its model with --overwrite" in refusal(run(*arguments))
    (output / "puzzle_trm.safetensors").write_text("broken")
    assert run(*arguments, "--overwrite").exit_code == 0
    assert content(output) == before
    (output / "index.json").write_text("{}")
    assert "contains a training run" in refusal(run(*arguments, "--overwrite"))


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_an_input_is_never_replaced(overwrite: tuple[str, ...], world: Path, tmp_path: Path) -> None:
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"question": "1+1", "answer": "2"}\n')
    (tmp_path / "link.jsonl").symlink_to(questions)
    (tmp_path / "a.jsonl.partial").symlink_to(questions)
    puzzles, chart = tmp_path / "puzzles.txt", tmp_path / "chart.png"
    puzzles.write_text(PUZZLE)
    chart.write_text("{}")
    weights = world / "model" / "puzzle_trm.safetensors"
    before = content(tmp_path), content(world)
    for arguments in (
        ("generate", *ARITHMETIC, "--input", questions, "-o", tmp_path / "link.jsonl"),
        ("generate", *ARITHMETIC, "--input", questions, "-o", tmp_path / "a.jsonl"),
        ("eval", "lm", *ARITHMETIC, "--data", f"aime,{questions}", "-o", questions),
        ("solve", "--input", puzzles, "--gif", puzzles),
        ("export", "official", world / "model", "-o", weights),
        ("bench", "--json", chart, "--plot", chart),
    ):
        line = refusal(run(*arguments, *overwrite))
        assert "is also an input: choose another --" in line or "a.jsonl.partial" in line
    assert (content(tmp_path), content(world)) == before


def test_two_outputs_are_two_files(tmp_path: Path) -> None:
    both = ("--plot", tmp_path / "a.png", "-o", tmp_path / "a.png")
    assert "choose two different files" in refusal(run("eval", "lm", *ARITHMETIC, *both))


def test_results_are_appended_only_to_results(tmp_path: Path) -> None:
    bench = ("bench", "--quick", "--backends", "eager", "--mode", "forward", "--json")
    results = tmp_path / "results.jsonl"
    assert run(*bench, results).exit_code == 0
    one = results.read_bytes()
    assert run(*bench, results).exit_code == 0
    assert results.read_bytes().startswith(one) and results.read_bytes().count(b"\n") == 2
    two = results.read_bytes()
    with full_disk(len(two) + 100):
        assert "File too large" in refusal(run(*bench, results))
    assert results.read_bytes() == two
    (tmp_path / "README.md").write_text("# Mine\n")
    assert "is not a file of results: choose another --json" in refusal(run(*bench, tmp_path / "README.md"))
    assert (tmp_path / "README.md").read_text() == "# Mine\n"


def test_special_files_need_no_overwrite() -> None:
    assert run("data", "arithmetic", "--num-samples", 2, "-o", "/dev/null").exit_code == 0
    assert run("generate", "1+1", *ARITHMETIC, "-o", "/dev/null").exit_code == 0


def test_answers_go_into_a_pipe() -> None:
    reading, writing = os.pipe()
    try:
        assert run("generate", "1+1", *ARITHMETIC, "-o", f"/dev/fd/{writing}").exit_code == 0
        assert json.loads(os.read(reading, 10_000))["question"] == "1+1"
    finally:
        os.close(reading)
        os.close(writing)


class Stopping:
    """Raises a signal at the third batch of ``generate``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, act: Callable[[], Any]) -> None:
        from llm_trm.evaluate.language_model_modes import Responder

        self.calls, self.act, self.before = 0, act, Responder.reply
        monkeypatch.setattr(Responder, "reply", lambda *arguments: self.reply(*arguments))

    def reply(self, *arguments: Any) -> Any:
        self.calls += 1
        if self.calls == 3:
            self.act()
        return self.before(*arguments)


def answers(path: Path) -> list[str]:
    return [json.loads(line)["question"] for line in path.read_text().splitlines()]


@pytest.fixture
def questions(tmp_path: Path) -> tuple[object, ...]:
    path = tmp_path / "q.txt"
    path.write_text("1+1\n2+2\n3+3\n4+4\n5+5\n")
    return ("generate", *ARITHMETIC, "--input", path, "--batch-size", 1, "-o")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("existed", [False, True])
def test_an_interruption_keeps_the_answers_before_it(
    number: int,
    existed: bool,
    questions: tuple[object, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "answers.jsonl"
    if existed:
        output.write_text("old")
    Stopping(monkeypatch, lambda: signal.raise_signal(number))
    result = run(*questions, output, *(("--overwrite",) if existed else ()))
    assert result.exit_code == 128 + number
    said = f"llm-trm: stopped after 2 of 5 questions; the answers are in {output}"
    assert result.stderr.splitlines()[-1] == said
    assert answers(output) == ["1+1", "2+2"]
    assert content(tmp_path).keys() == {"q.txt", "answers.jsonl"}


def test_an_interruption_before_the_first_answer_keeps_the_old_file(
    questions: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "answers.jsonl"
    output.write_text("old")
    stopping = Stopping(monkeypatch, lambda: signal.raise_signal(signal.SIGTERM))
    stopping.calls = 2
    result = run(*questions, output, "--overwrite")
    assert result.exit_code == 143
    assert result.stderr.splitlines()[-1] == "llm-trm: stopped after 0 of 5 questions"
    assert content(tmp_path).keys() == {"q.txt", "answers.jsonl"} and output.read_text() == "old"


def test_a_full_disk_keeps_the_complete_answers(questions: tuple[object, ...], tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    with full_disk(500):
        line = refusal(run(*questions, output))
    assert f"{output}: File too large" in line
    found = answers(output)
    assert 0 < len(found) < 5 and found == ["1+1", "2+2", "3+3", "4+4"][: len(found)]
    assert content(tmp_path).keys() == {"q.txt", "answers.jsonl"}


def test_answers_of_a_killed_run_are_found(
    questions: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, partial = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.partial"
    seen: list[list[str]] = []
    Stopping(monkeypatch, lambda: seen.append(answers(partial)))
    assert run(*questions, output).exit_code == 0
    assert seen == [["1+1", "2+2"]]
    assert len(answers(output)) == 5 and not partial.exists()
    output.rename(partial)
    line = refusal(run(*questions, output))
    assert f"{partial} has the answers of a run that goes on or was killed: rename it" in line
    assert len(answers(partial)) == 5 and not output.exists()
    assert run(*questions, output, "--overwrite").exit_code == 0
    assert content(tmp_path).keys() == {"q.txt", "answers.jsonl"}


def test_the_end_of_a_job_ends_a_conversation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_trm.cli.generate._is_terminal", lambda: True)
    Stopping(monkeypatch, lambda: signal.raise_signal(signal.SIGTERM))
    output = tmp_path / "said.jsonl"
    conversation = ["generate", *ARITHMETIC, "-o", str(output)]
    result = CliRunner().invoke(main, conversation, input="1+1\n2+2\n3+3\n4+4\n")
    assert result.exit_code == 143
    assert answers(output) == ["1+1", "2+2"]


def test_a_folder_of_states_that_cannot_be_made_is_refused_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    line = refusal(
        run("train", "phase1", *ARITHMETIC, "-o", tmp_path / "out", "--states", tmp_path / "file" / "in")
    )
    assert "is not a folder" in line
    assert not (tmp_path / "out").exists()
