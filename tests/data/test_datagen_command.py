"""Tests of ``llm-trm datagen``: its output and its errors."""

from __future__ import annotations

import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from llm_trm.cli import main
from llm_trm.data import generation
from llm_trm.data.pairs import open_pairs
from llm_trm.models.tiny import tiny_language_model, tiny_tokenizer


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["datagen", "--device", "cpu", *map(str, arguments)], prog_name="llm-trm")


def test_summary(model_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "pairs"
    sizes = ("--num-samples", "20", "--max-new-tokens", "30", "--shard-size", "10", "--seed", "1")
    result = run("--model", model_folder, *sizes, "--operations", "3", "--dtype", "bf16", "-o", output)
    assert result.exit_code == 0, result.output
    pairs = open_pairs(output)
    assert pairs.dtype == "bfloat16"
    assert pairs.settings["min_operations"] == pairs.settings["operations"] == 3
    assert f"{pairs.samples} pairs of 20 problems: {output}" in result.stdout
    assert pairs.failures
    for count in pairs.failures.values():
        assert f"  {count} without: " in result.stdout
    thinking = sum(record["thinking_tokens"] for record in pairs.records()) / pairs.samples
    assert (
        f"context {pairs.rows / pairs.samples:.1f} tokens on average, thinking {thinking:.1f}"
        in result.stdout
    )
    assert f"llm-trm train phase2 --data {output}" in result.stdout
    graded = [record["correct"] for record in pairs.records() if record["correct"] is not None]
    assert (f"of {len(graded)} answers" in result.stdout) == bool(graded)
    again = run("--model", model_folder, *sizes, "--operations", "3", "--dtype", "bf16", "-o", output)
    assert again.stdout == result.stdout


@pytest.mark.parametrize(
    ("more", "operations"),
    [("", (3, 3)), ("min-operations = 2", (2, 3)), ("[world]\nmin_operations = 2", (2, 3))],
)
def test_settings_from_a_file(
    model_folder: Path, tmp_path: Path, more: str, operations: tuple[int, int]
) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(
        f'model = "{model_folder}"\nnum-samples = 4\nmax-new-tokens = 30\noperations = 3\n{more}\n'
    )
    result = run("--config", file, "--num-samples", "2", "-o", tmp_path / "pairs")
    assert result.exit_code == 0, result.output
    found = open_pairs(tmp_path / "pairs").settings
    assert (found["min_operations"], found["operations"]) == operations
    assert (found["num_samples"], found["max_new_tokens"], found["top_p"]) == (2, 30, 1.0)


def test_run_without_a_pair_explains_what_to_do(model_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "two.jsonl"
    file.write_text('{"question": "1+1"}\n{"question": "1+2"}\n')
    options = ("--data", file, "--num-samples", "5", "--max-prompt-tokens", "1", "-o", tmp_path / "pairs")
    result = run("--model", model_folder, *options)
    assert result.exit_code == 0, result.output
    assert "0 pairs of 2 problems (5 were requested; there are no more)" in result.stdout
    assert "2 without: prompt longer than --max-prompt-tokens" in result.stdout
    assert "phase2" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--temperature", "-1"), ("--temperature",)),
        (("--top-p", "0"), ("--top-p",)),
        (("--num-samples", "0"), ("--num-samples",)),
        (("--dtype", "fp16"), ("--dtype", "bf16")),
        (("--data", "gsm9k"), ("--data", "gsm8k")),
        (("--data", "missing.jsonl"), ("missing.jsonl", "No such file")),
        (("--data", "gsm8k", "--modulus", "7"), ("--modulus", "--data arithmetic")),
        (("--min-operations", "9"), ("operations", "9 to 5")),
        (("--output", "/dev/null/pairs"), ("/dev/null/pairs", "cannot be written")),
        (("--model", "/no/such/model"), ("/no/such/model", "cannot be loaded")),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(
    arguments: tuple[str, ...], words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generation, "write_shard", lambda *_: pytest.fail("something was generated"))
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


def test_model_without_thinking_tags_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tiny_language_model(tokenizer).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    description = tmp_path / "lm" / "tokenizer.json"
    description.write_text(description.read_text().replace("<think>", "<muse>"))
    result = run("--model", tmp_path / "lm", "-o", tmp_path / "pairs")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("llm-trm: error: model ")
    assert "<think>" in result.stderr
    assert not (tmp_path / "pairs").exists()


def test_interruption_explains_how_to_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(generation.ThinkingDataGenerator, "run", interrupt)
    result = run("-o", tmp_path / "pairs")
    assert result.exit_code == 130
    assert "the same command continues" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("shard", [0, 1])
def test_an_interruption_names_the_command_that_continues(
    shard: int, number: int, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "pairs"
    options = ("--model", str(model_folder), "--max-new-tokens", "30", "--shard-size", "3", "-o", str(folder))
    asked = ("--num-samples", "9", *options)
    assert run(*asked).exit_code == 0
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert run("--num-samples", "6", *options, "--overwrite").exit_code == 0
    before = generation.write_shard

    def stop(place: Path, which: int, *arguments: Any) -> None:
        if which == shard:
            signal.raise_signal(number)
        before(place, which, *arguments)

    command = ["datagen", *asked]
    monkeypatch.setattr(sys, "argv", ["llm-trm", *command, "--overwrite"])
    monkeypatch.setattr(generation, "write_shard", stop)
    result = run(*asked, "--overwrite")
    assert result.exit_code == 128 + number
    assert result.stderr.splitlines()[-1] == (
        "llm-trm: stopped: the same command without --overwrite continues after the last complete shard: "
        f"{shlex.join(['llm-trm', *command])}"
    )
    assert len(list(folder.glob("*.jsonl"))) == shard
    monkeypatch.setattr(generation, "write_shard", before)
    assert run(*asked).exit_code == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


def test_an_interruption_before_the_start_replaces_nothing(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    options = ("--model", model_folder, "--max-new-tokens", "30", "-o", tmp_path / "pairs")
    assert run("--num-samples", "3", *options).exit_code == 0
    whole = {path.name: path.read_bytes() for path in (tmp_path / "pairs").iterdir()}
    monkeypatch.setattr(generation, "load_thinking_model", stop)
    result = run("--num-samples", "6", *options, "--overwrite")
    assert result.exit_code == 143
    assert result.stderr.splitlines()[-1] == "llm-trm: stopped: nothing was replaced"
    assert {path.name: path.read_bytes() for path in (tmp_path / "pairs").iterdir()} == whole
    assert run("--num-samples", "3", *options, "-o", tmp_path / "new").exit_code == 143
    assert not (tmp_path / "new").exists()
