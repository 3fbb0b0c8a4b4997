"""Ctrl-C and SIGTERM in trainings on a Trainer: a checkpoint, and a line that says how to continue."""

from __future__ import annotations

import json
import shlex
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from torch import Tensor

pytest.importorskip("peft")

from llm_trm.cli import main
from llm_trm.data.arithmetic import World
from llm_trm.errors import Interrupted
from llm_trm.models import tiny
from llm_trm.train.lm.config import LanguageModelConfig
from llm_trm.train.lm.train import train_language_model
from llm_trm.train.lora.train import train_lora
from llm_trm.train.phase3.config import Phase3Config
from llm_trm.train.run.report import Report
from tests.causal.lora_world import settings, write_language_model, write_rows
from tests.train.signals import SignalAt, send_to_commands
from tests.train.test_language_model import SMALL


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model, problems, and a model with a recursion to be rewarded."""
    folder = tmp_path_factory.mktemp("world")
    write_language_model(folder / "lm")
    write_rows(folder / "problems.jsonl")
    train_lora(settings(folder, output=folder / "latent", steps=1, lora=False))
    return folder


@pytest.fixture(autouse=True)
def small_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiny.PRESETS, "tiny", SMALL)


def train(kind: str, world: Path, output: Path, report: Report | None = None, **changes: Any) -> None:
    """A run of 8 steps whose checkpoints are due at 3 and 6."""
    common = {"output": output, "track": "jsonl", "log_every": 1, "device": "cpu", **changes}
    if kind == "lora":
        train_lora(settings(world, **{"steps": 8, "eval_every": 3, "curriculum": 2, **common}), report)
    elif kind == "lm":
        config = LanguageModelConfig(world=World(1, 1), steps=8, batch_size=16, save_every=3)
        train_language_model(replace(config, **common), report)
    else:
        pytest.importorskip("trl")
        from llm_trm.train.phase3.train import train_phase3

        sizes = {"group_size": 2, "batch_size": 4, "max_new_tokens": 3, "eval_samples": 2, "eval_every": 4}
        config = Phase3Config(str(world / "latent"), world=World(1, 4), steps=8, save_every=3, **sizes)
        train_phase3(replace(config, **common), report)


def weights(folder: Path) -> dict[str, Tensor]:
    (file,) = folder.glob("*model.safetensors")
    return load_file(file)


def losses(output: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


@pytest.mark.parametrize("kind", ["lm", "lora", "phase3"])
def test_an_interrupted_run_ends_as_an_undisturbed_one(kind: str, world: Path, tmp_path: Path) -> None:
    """Between the checkpoints that are due anyway, and after the last update."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(kind, world, whole)
    for step, number in ((4, signal.SIGINT), (8, signal.SIGTERM)):
        name = signal.Signals(number).name
        with pytest.raises(Interrupted, match=f"{name}: stopped after step {step}; to continue: llm-trm"):
            train(kind, world, parts, SignalAt(step, number), resume=step > 4)
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
        assert (parts / f"checkpoint-{step}" / "trainer_state.json").exists()
        assert not list(parts.glob("*.safetensors")), "nothing final is written"
    train(kind, world, parts, resume=True)
    assert losses(parts) == losses(whole)
    found = weights(parts)
    for name, weight in weights(whole).items():
        assert torch.equal(found[name], weight), name


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("kind", ["lm", "lora", "phase3"])
def test_the_command_says_how_to_continue(
    kind: str, number: int, code: int, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "phase3":
        pytest.importorskip("trl")
    options: dict[str, tuple[object, ...]] = {
        "lm": ("--operations", 1, "--batch-size", 4, "--eval-samples", 2),
        "lora": (
            *("--data", world / "problems.jsonl", "--model", world / "lm", "--batch-size", 4, "--layers", 1),
            *("-n", 1, "-T", 1, "--supervision-steps", 1, "--num-latents", 2, "--eval-samples", 4),
        ),
        "phase3": (
            *("--checkpoint", world / "latent", "--operations", 1, "--eval-samples", 2),
            *("--group-size", 2, "--batch-size", 4, "--max-new-tokens", 3),
        ),
    }

    def invoke(*arguments: object) -> Result:
        return CliRunner().invoke(main, ["train", *map(str, arguments)], prog_name="llm-trm")

    run = tmp_path / "run"
    send_to_commands(monkeypatch, 2, number)
    stopped = invoke(kind, "-o", run, "--steps", 3, "--device", "cpu", *options[kind])
    assert stopped.exit_code == code, (stopped.output, stopped.exception)
    command = f"llm-trm train {kind} --config {run / f'{kind}.json'} --resume"
    lines = [line for line in stopped.stderr.splitlines() if line.startswith("llm-trm")]
    name = signal.Signals(number).name
    assert lines == [f"llm-trm: {name}: stopped after step 2; to continue: {command}"]
    assert (run / "checkpoint-2").is_dir() and not (run / "model.safetensors").exists()
    continued = invoke(*shlex.split(command)[2:])
    assert continued.exit_code == 0, (continued.output, continued.exception)
    assert "resuming at" in continued.stdout and "The model is in" in continued.stdout
    refused = invoke(*shlex.split(command)[2:], "--seed", 5)
    assert refused.exit_code == 2 and "seed was 0 and is 5" in refused.stderr
    again = invoke(*shlex.split(command)[2:-1])
    assert again.exit_code == 2 and "already contains a run" in again.stderr
    replaced = invoke(*shlex.split(command)[2:-1], "--overwrite", "--steps", 1, "--seed", 5)
    assert replaced.exit_code == 0, (replaced.output, replaced.exception)
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-1"]
    assert json.loads((run / f"{kind}.json").read_text())["seed"] == 5
