"""Ctrl-C and SIGTERM: the step ends, a checkpoint is written, and one line says how to continue."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from llm_trm.cli import main
from llm_trm.data.arithmetic import World
from llm_trm.errors import InputError, Interrupted
from llm_trm.train.phase1.config import Phase1Config
from llm_trm.train.phase1.report import Progress
from llm_trm.train.phase1.trainer import CompressorPretrainer
from llm_trm.train.phase2.trainer import TRMSequenceTrainer
from llm_trm.train.puzzle.trainer import PuzzleTrainer
from llm_trm.train.run.report import Report
from llm_trm.weights import read_tensors
from tests.data.tiny import save_tiny_model
from tests.puzzle import toy as puzzles
from tests.train.signals import SignalAt, send_to_commands
from tests.train.toy import content_of, toy_config, write_toy


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy"))


@pytest.mark.parametrize("step", [1, 4, 5, 8], ids=lambda step: f"step {step}")
def test_phase2_continues_bit_for_bit(step: int, toy: Path, tmp_path: Path) -> None:
    """At the first and last batch of an epoch, in the middle, and at the end of the training."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    options: dict[str, Any] = {"dropout": 0.1, "halt_loss": "bce", "track": "jsonl"}
    TRMSequenceTrainer(toy_config(toy, output=tmp_path / "whole", **options)).train()
    config = toy_config(toy, output=tmp_path / "parts", **options)
    with pytest.raises(Interrupted, match=f"SIGINT: stopped after step {step}; to continue: llm-trm train"):
        TRMSequenceTrainer(config, SignalAt(step)).train()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    TRMSequenceTrainer(toy_config(toy, output=tmp_path / "parts", resume=True, **options)).train()
    assert final_state(tmp_path / "parts") == final_state(tmp_path / "whole")


def final_state(output: Path) -> dict[str, Any]:
    """What the last checkpoint holds, and the metrics: an interrupted run has other checkpoints before it."""
    content = content_of(output)
    last = content["index"]["last"]
    return {name: value for name, value in content.items() if last in name or name == "metrics"}


@pytest.mark.parametrize("step", [1, 6, 8, 12], ids=lambda step: f"step {step}")
def test_puzzles_continue_bit_for_bit(step: int, tmp_path: Path) -> None:
    folder = puzzles.write_toy(tmp_path)
    PuzzleTrainer(puzzles.toy_config(folder, output=tmp_path / "whole")).train()
    with pytest.raises(Interrupted, match=f"SIGTERM: stopped after step {step};"):
        PuzzleTrainer(
            puzzles.toy_config(folder, output=tmp_path / "parts"), SignalAt(step, signal.SIGTERM)
        ).train()
    PuzzleTrainer(puzzles.toy_config(folder, output=tmp_path / "parts", resume=True)).train()
    whole, parts = (
        read_tensors(PuzzleTrainer(config).run.checkpoints.last / "state.safetensors", "")
        for config in (
            puzzles.toy_config(folder, output=tmp_path / name, resume=True) for name in ("whole", "parts")
        )
    )
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name


class SignalInStage(Progress):
    """Sends this process a signal in a stage, once it has made so many steps."""

    def __init__(self, stage: str, steps: int) -> None:
        self.stage, self.steps = stage, steps

    def training(self, what: str, done: int, total: int, loss: float, cosine: float) -> None:
        if self.stage in what and done >= self.steps:
            signal.raise_signal(signal.SIGINT)
            self.steps = 10**9


@pytest.mark.parametrize(("stage", "steps"), [("1a", 20), ("1a", 11), ("1b", 40)])
@pytest.mark.parametrize("compressor", ["dimension", "latent"])
def test_phase1_continues_bit_for_bit(compressor: str, stage: str, steps: int, tmp_path: Path) -> None:
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps(problem.record()) + "\n" for problem in World().problems(80)))
    model = save_tiny_model(tmp_path / "model")

    def config(name: str) -> Phase1Config:
        return Phase1Config(
            tmp_path / name,
            str(model),
            compressor=compressor,  # type: ignore[arg-type]
            text=str(file),
            traces=str(file),
            num_tokens=1500,
            batch_size=128 if compressor == "dimension" else 4,
            epochs=6,
            device="cpu",
        )

    CompressorPretrainer(config("whole")).train()
    with pytest.raises(
        Interrupted, match=r"to continue: llm-trm train phase1 --config .*config.json --resume$"
    ):
        CompressorPretrainer(config("parts"), SignalInStage(stage, steps)).train()
    assert (tmp_path / "parts" / stage / "unfinished" / "state.json").exists()
    CompressorPretrainer(replace(config("parts"), resume=True)).train()
    assert not (tmp_path / "parts" / stage / "unfinished").exists()
    for path in (tmp_path / "whole").glob("1?/*"):
        other = tmp_path / "parts" / path.relative_to(tmp_path / "whole")
        assert path.read_bytes() == other.read_bytes(), path.name


def test_phase1_starts_over_where_what_was_kept_is_broken(tmp_path: Path) -> None:
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps(problem.record()) + "\n" for problem in World().problems(80)))
    model = save_tiny_model(tmp_path / "model")
    config = Phase1Config(
        tmp_path / "run",
        str(model),
        stage="1a",
        text=str(file),
        num_tokens=1500,
        batch_size=128,
        epochs=3,
        device="cpu",
    )
    with pytest.raises(Interrupted):
        CompressorPretrainer(config, SignalInStage("1a", 11)).train()
    kept = tmp_path / "run" / "1a" / "unfinished"
    (kept / "state.json").write_text("{}")
    with pytest.raises(InputError, match=r"state.json .* start over with --overwrite"):
        CompressorPretrainer(config).train()
    CompressorPretrainer(replace(config, overwrite=True)).train()
    assert not kept.exists() and (tmp_path / "run" / "1a" / "compressor.json").exists()


def test_a_second_signal_acts_at_once(toy: Path, tmp_path: Path) -> None:
    class Twice(Report):
        def step(self, step: int) -> None:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        TRMSequenceTrainer(toy_config(toy, output=tmp_path / "run"), Twice()).train()
    assert not isinstance(caught.value, Interrupted)
    assert not (tmp_path / "run" / "index.json").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_says_once_how_to_continue(
    number: int, code: int, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"

    def invoke(*arguments: object) -> Result:
        return CliRunner().invoke(main, ["train", "phase2", *map(str, arguments)], prog_name="llm-trm")

    send_to_commands(monkeypatch, 2, number)
    sizes = ("--layers", 1, "-n", 1, "-T", 1, "--supervision-steps", 1, "--batch-size", 8, "--epochs", 1)
    stopped = invoke(
        *("--data", toy / "pairs", "--compressor", toy / "compressor", "-o", run, "--device", "cpu", *sizes)
    )
    assert stopped.exit_code == code, stopped.output
    command = f"llm-trm train phase2 --config {run / 'config.json'} --resume"
    name = signal.Signals(number).name
    assert stopped.stderr == f"llm-trm: {name}: stopped after step 2; to continue: {command}\n"
    continued = invoke(*command.split()[3:])
    assert continued.exit_code == 0, continued.output
    assert "resuming at epoch 1, batch 3" in continued.stdout
    settings: Mapping[str, Any] = json.loads((run / "config.json").read_text())
    assert settings["n_layers"] == 1 and settings["epochs"] == 1
