"""``llm-trm train phase2``: a run from the command line, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from llm_trm.cli import main
from llm_trm.models.compression import LatentAttentionCompressor, save_compressor
from tests.train.toy import write_compressor, write_pairs, write_toy

FAST = (
    *("--epochs", "2", "--batch-size", "8", "--val-fraction", "0.2", "--supervision-steps", "2"),
    *("--layers", "1", "-n", "1", "-T", "2", "--device", "cpu"),
)


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs, a compressor and a finished run."""
    folder = write_toy(tmp_path_factory.mktemp("command"))
    result = phase2(folder, *FAST, "--track", "jsonl")
    assert result.exit_code == 0, result.output
    (folder / "output").write_text(result.stdout)
    return folder


@pytest.fixture
def copied(toy_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(toy_run, tmp_path, dirs_exist_ok=True)
    return tmp_path


def phase2(folder: Path, *options: str) -> Result:
    paths = {"--data": "pairs", "--compressor": "compressor", "--output": "run"}
    given = [
        word for name, path in paths.items() if name not in options for word in (name, str(folder / path))
    ]
    return CliRunner().invoke(main, ["train", "phase2", *given, *options], prog_name="llm-trm")


def test_run_says_how_it_went_and_what_is_next(toy_run: Path) -> None:
    lines = (toy_run / "output").read_text().splitlines()
    assert "32 samples to train on, 8 held out" in lines[0]
    assert [line.split()[:2] for line in lines[1:3]] == [["epoch", "1"], ["epoch", "2"]]
    for word in ("loss", "cos", "halt", "held out", "samples/s"):
        assert word in lines[1]
    assert lines[3].startswith("Best: epoch")
    assert f"llm-trm eval phase2 --checkpoint {toy_run / 'run'}" in lines[-1]
    run = toy_run / "run"
    assert json.loads((run / "config.json").read_text())["batch_size"] == 8
    assert len((run / "metrics.jsonl").read_text().splitlines()) >= 2
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_help_teaches() -> None:
    text = CliRunner().invoke(main, ["train", "phase2", "--help"]).output
    for words in ("On the arithmetic world", "SmolLM3-3B on a GPU", "accelerate launch", "--resume"):
        assert words in text


def state_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def missing_shard(folder: Path) -> tuple[str, ...]:
    (folder / "pairs" / "shard-00001.safetensors").unlink()
    return ("--overwrite",)


def truncated_shard(folder: Path) -> tuple[str, ...]:
    shard = folder / "pairs" / "shard-00001.safetensors"
    os.truncate(shard, shard.stat().st_size - 100)
    return ("--overwrite",)


def nan_in_the_data(folder: Path) -> tuple[str, ...]:
    shard = folder / "pairs" / "shard-00000.safetensors"
    size, tensors = shard.stat().st_size, load_file(shard)
    tensors["hidden_pre"][3, 2] = torch.nan
    save_file(tensors, shard, {"llm_trm": json.dumps({"version": 1, "failures": {}})})
    assert shard.stat().st_size == size
    return ("--overwrite",)


def other_width(folder: Path) -> tuple[str, ...]:
    write_pairs(folder / "wide", width=32)
    return ("--overwrite", "--data", str(folder / "wide"))


def other_width_held_out(folder: Path) -> tuple[str, ...]:
    write_pairs(folder / "wide", width=32)
    return ("--overwrite", "--val-data", str(folder / "wide"))


def latent_compressor(folder: Path) -> tuple[str, ...]:
    save_compressor(LatentAttentionCompressor(16, 4, 2), folder / "latent")
    return ("--overwrite", "--compressor", str(folder / "latent"))


def heads(folder: Path) -> tuple[str, ...]:
    return ("--overwrite", "--heads", "3")


def large_batch(folder: Path) -> tuple[str, ...]:
    return ("--overwrite", "--batch-size", "33")


def existing_run(folder: Path) -> tuple[str, ...]:
    return ()


def nothing_to_resume(folder: Path) -> tuple[str, ...]:
    return ("--resume", "--output", str(folder / "nowhere"))


def resume_and_overwrite(folder: Path) -> tuple[str, ...]:
    return ("--resume", "--overwrite")


def other_settings(folder: Path) -> tuple[str, ...]:
    return ("--resume", "--learning-rate", "0.5")


def every_checkpoint(folder: Path) -> list[Path]:
    found = list((folder / "run" / "checkpoints").iterdir())
    assert len(found) == 2
    return found


def broken_tensors(folder: Path) -> tuple[str, ...]:
    for checkpoint in every_checkpoint(folder):
        os.truncate(checkpoint / "state.safetensors", 100)
    return ("--resume",)


def broken_progress(folder: Path) -> tuple[str, ...]:
    for checkpoint in every_checkpoint(folder):
        (checkpoint / "state.json").write_text('{"epoch": 1}')
    return ("--resume",)


def lost_checkpoint(folder: Path) -> tuple[str, ...]:
    for checkpoint in every_checkpoint(folder):
        shutil.rmtree(checkpoint)
    return ("--resume",)


def below_a_file(folder: Path) -> tuple[str, ...]:
    return ("--output", str(folder / "pairs" / "pairs.json" / "run"))


def indivisible_steps(folder: Path) -> tuple[str, ...]:
    return ("--overwrite", "--supervision-steps", "8", "--steps-per-update", "3")


def untrained_head(folder: Path) -> tuple[str, ...]:
    return ("--overwrite", "--halt-loss", "none", "--halt-in-training", "sample")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (missing_shard, ("shard-00001.safetensors", "missing", "llm-trm datagen")),
        (truncated_shard, ("shard-00001.safetensors", "bytes", "llm-trm datagen")),
        (nan_in_the_data, ("shard-00000.safetensors", "NaN", "llm-trm datagen")),
        (other_width, ("compressor", "width 16", "have 32", "llm-trm train phase1")),
        (other_width_held_out, ("compressor", "width 16", "have 32")),
        (latent_compressor, ("latent", "--compressor dimension")),
        (heads, ("--heads 3", "width 8", "divisor")),
        (large_batch, ("32 samples", "--batch-size of at most 32")),
        (existing_run, ("already contains a run", "--resume", "--overwrite")),
        (nothing_to_resume, ("nowhere contains no checkpoint to resume", "leave --resume out")),
        (resume_and_overwrite, ("--resume and --overwrite",)),
        (other_settings, ("learning_rate was 0.0001 and is 0.5", "--overwrite")),
        (broken_tensors, ("state.safetensors", "--overwrite")),
        (broken_progress, ("state.json", "--overwrite")),
        (lost_checkpoint, ("state.json", "--overwrite")),
        (below_a_file, ("pairs.json", "choose another folder")),
        (indivisible_steps, ("--steps-per-update 3", "--supervision-steps 8")),
        (untrained_head, ("--halt-in-training sample", "--halt-loss none")),
    ],
)
def test_bad_input_gets_one_line_and_nothing_is_overwritten(
    spoil: Callable[[Path], tuple[str, ...]], words: tuple[str, ...], copied: Path
) -> None:
    options = spoil(copied)
    before = state_of(copied)
    result = phase2(copied, *FAST, *options)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr
    assert state_of(copied) == before


def test_overwrite_replaces_the_run(copied: Path) -> None:
    write_compressor(copied / "compressor", compressed=4)
    result = phase2(copied, *FAST, "--overwrite", "--epochs", "1")
    assert result.exit_code == 0, result.output
    assert "D' = 4" in result.stdout
    assert len(list((copied / "run" / "checkpoints").iterdir())) == 1
