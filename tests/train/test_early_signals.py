"""Signals before, between and after the steps of a training: one line, and the command that continues."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from llm_trm.cli import main
from llm_trm.data.arithmetic import World
from llm_trm.errors import Interrupted
from llm_trm.train.phase1 import fit, states
from llm_trm.train.phase2 import trainer as phase2_trainer
from llm_trm.train.phase2.trainer import TRMSequenceTrainer
from llm_trm.train.run.checkpoints import Checkpoints
from tests.data.tiny import save_tiny_model
from tests.train.signals import SignalAt
from tests.train.toy import toy_config, write_toy

SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
SIZES = ("--layers", 1, "-n", 1, "-T", 1, "--supervision-steps", 1, "--batch-size", 8, "--epochs", 2)


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return write_toy(tmp_path)


def phase2(toy: Path, *options: object) -> Result:
    paths = (
        "--data",
        toy / "pairs",
        "--compressor",
        toy / "compressor",
        "-o",
        toy / "run",
        "--device",
        "cpu",
    )
    words = ["train", "phase2", *map(str, (*paths, *SIZES, *options))]
    return CliRunner().invoke(main, words, prog_name="llm-trm")


def send(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, *numbers: int) -> None:
    """Send signals to this process whenever a function is called."""
    before = getattr(owner, name)

    def patched(*arguments: Any, **options: Any) -> Any:
        for number in numbers:
            signal.raise_signal(number)
        return before(*arguments, **options)

    monkeypatch.setattr(owner, name, patched)


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_while_the_data_are_read(number: int, code: int, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        send(patch, phase2_trainer, "read_inputs", number)
        stopped = phase2(toy)
    assert (stopped.exit_code, stopped.stdout) == (code, "")
    word = "interrupted" if number == signal.SIGINT else "terminated"
    assert stopped.stderr == f"llm-trm: {word}\n"
    assert not (toy / "run").exists()
    # A run that is resumed can be resumed again; one that was to be replaced was not.
    assert phase2(toy).exit_code == 0
    with monkeypatch.context() as patch:
        send(patch, phase2_trainer, "read_inputs", number)
        stopped, replaced = phase2(toy, "--resume"), phase2(toy, "--overwrite")
    name = signal.Signals(number).name
    again = f"llm-trm train phase2 --config {toy / 'run' / 'config.json'} --resume"
    assert stopped.exit_code == code
    assert stopped.stderr == f"llm-trm: {name}: stopped; to continue: {again}\n"
    assert replaced.stderr == f"llm-trm: {word}\n"


@pytest.mark.parametrize("place", ["_validate", "_save"])
@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_twice_during_an_evaluation_or_a_checkpoint(
    number: int, code: int, place: str, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second signal acts at once: the checkpoint before stays whole, and nothing half-written is left."""
    calls = 0
    before = getattr(TRMSequenceTrainer, place)

    def twice(self: TRMSequenceTrainer, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls < 2:
            return before(self, *arguments)
        if place == "_validate":
            signal.raise_signal(number)
            signal.raise_signal(number)
        with monkeypatch.context() as patch:
            send(patch, phase2_trainer, "write_state", number, number)
            return before(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(TRMSequenceTrainer, place, twice)
        stopped = phase2(toy)
    assert stopped.exit_code == code
    name = signal.Signals(number).name
    assert f"llm-trm: {name}: stopped; to continue: llm-trm train phase2 --config" in stopped.stderr
    folder = toy / "run" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == [Checkpoints(toy / "run").newest_whole().name]
    assert phase2(toy, "--resume").exit_code == 0


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_while_phase1_computes_states(
    number: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps(problem.record()) + "\n" for problem in World().problems(40)))
    options = ("--model", save_tiny_model(tmp_path / "model"), "--text", file, "--stage", "1a", "--epochs", 1)
    options += ("--num-tokens", 800, "--batch-size", 64, "--device", "cpu", "-o", tmp_path / "run")

    def phase1(*words: object) -> Result:
        return CliRunner().invoke(main, ["train", "phase1", *map(str, words)], prog_name="llm-trm")

    with monkeypatch.context() as patch:
        send(patch, states, "final_states", number)
        stopped = phase1(*options)
    again = f"train phase1 --config {tmp_path / 'run' / 'config.json'} --resume"
    name = signal.Signals(number).name
    assert stopped.exit_code == code
    assert stopped.stderr.splitlines()[-1] == f"llm-trm: {name}: stopped; to continue: llm-trm {again}"
    assert "Traceback" not in stopped.output and not list((tmp_path / "run").rglob("*.llm-trm-tmp"))
    # The first evaluation of the optimisation.
    with monkeypatch.context() as patch:
        send(patch, fit, "quality", number, number)
        stopped = phase1(*again.split()[2:])
    assert stopped.exit_code == code
    assert stopped.stderr.splitlines()[-1].startswith(f"llm-trm: {name}: stopped; to continue: llm-trm train")
    assert phase1(*again.split()[2:]).exit_code == 0


@pytest.mark.parametrize("kind", ["lm", "lora"])
def test_while_a_trainer_saves(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice during the second checkpoint."""
    pytest.importorskip("peft")
    from transformers import Trainer, TrainerState

    from llm_trm.models import tiny
    from tests.causal.lora_world import write_language_model, write_rows
    from tests.train.test_language_model import SMALL

    monkeypatch.setitem(tiny.PRESETS, "tiny", SMALL)
    sizes = ("--layers", 1, "-n", 1, "-T", 1, "--supervision-steps", 1, "--num-latents", 2)
    model = write_language_model(tmp_path / "model")
    data = write_rows(tmp_path / "problems.jsonl")
    options: tuple[object, ...] = {
        "lm": ("--operations", 1, "--eval-samples", 2, "--save-every", 1),
        "lora": ("--data", data, "--model", model, "--eval-samples", 4, "--eval-every", 1, *sizes),
    }[kind]
    common = ("-o", tmp_path / "run", "--steps", 3, "--batch-size", 4, "--device", "cpu")

    def invoke(*words: object) -> Result:
        return CliRunner().invoke(main, ["train", kind, *map(str, words)], prog_name="llm-trm")

    save = Trainer._save_rng_state

    def interrupted(self: Any, folder: str) -> None:
        state: TrainerState = self.state
        if state.global_step == 2:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
        save(self, folder)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_rng_state", interrupted)
        stopped = invoke(*common, *options)
    assert stopped.exit_code == 143, stopped.output
    again = f"llm-trm train {kind} --config {tmp_path / 'run' / f'{kind}.json'} --resume"
    assert stopped.stderr.splitlines()[-1] == f"llm-trm: SIGTERM: stopped; to continue: {again}"
    assert not (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").exists()
    continued = invoke(*again.split()[3:])
    assert continued.exit_code == 0 and "resuming at" in continued.stdout, continued.output
    assert not list((tmp_path / "run").glob(".*"))


@pytest.mark.parametrize("ignored", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_was_ignored_stays_ignored(ignored: signal.Signals, toy: Path) -> None:
    """As Ctrl-C is in a background job of a script."""
    before = signal.signal(ignored, signal.SIG_IGN)
    try:
        TRMSequenceTrainer(toy_config(toy), SignalAt(2, ignored)).train()
        assert signal.getsignal(ignored) is signal.SIG_IGN
    finally:
        signal.signal(ignored, before)
    assert len(json.loads((Checkpoints(toy / "run").last / "state.json").read_text())["history"]) == 2


def test_once_during_an_evaluation_ends_the_next_step(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    send(monkeypatch, TRMSequenceTrainer, "_validate", signal.SIGINT)
    with pytest.raises(Interrupted, match="stopped after step 5; to continue: llm-trm train phase2"):
        TRMSequenceTrainer(toy_config(toy)).train()
