"""A disk that fills up, or an output that cannot be written: one line, and the run goes on from before."""

from __future__ import annotations

import errno
import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from llm_trm.cli import main
from llm_trm.cli.train import console
from llm_trm.data.arithmetic import World
from llm_trm.train.phase1 import states
from tests.data.tiny import save_tiny_model
from tests.puzzle import toy as puzzles
from tests.train.toy import write_toy

SIZES = ("--layers", 1, "-n", 1, "-T", 1, "--supervision-steps", 1)


def puzzle(folder: Path) -> tuple[object, ...]:
    puzzles.write_toy(folder / "puzzles")
    sizes = ("--d-model", 16, "--layers", 1, "--heads", 2, "--steps", 4, "--eval-every", 2, "--batch-size", 8)
    return ("--data", folder / "puzzles", *sizes)


def phase2(folder: Path) -> tuple[object, ...]:
    write_toy(folder)
    paths = ("--data", folder / "pairs", "--compressor", folder / "compressor")
    return (*paths, *SIZES, "--batch-size", 8, "--epochs", 1, "--save-every", 2)


def lm(folder: Path) -> tuple[object, ...]:
    return ("--operations", 1, "--eval-samples", 2, "--save-every", 2, "--steps", 4, "--batch-size", 4)


def lora(folder: Path) -> tuple[object, ...]:
    from tests.causal.lora_world import write_language_model, write_rows

    data, model = write_rows(folder / "problems.jsonl"), write_language_model(folder / "model")
    sizes = (*SIZES, "--num-latents", 2, "--eval-samples", 4, "--batch-size", 4)
    return ("--data", data, "--model", model, *sizes, "--steps", 4, "--eval-every", 2)


def phase3(folder: Path) -> tuple[object, ...]:
    pytest.importorskip("trl")
    from llm_trm.train.lora.train import train_lora
    from tests.causal.lora_world import settings, write_language_model, write_rows

    write_language_model(folder / "lm")
    write_rows(folder / "problems.jsonl")
    train_lora(settings(folder, output=folder / "latent", steps=1, lora=False))
    group = ("--operations", 1, "--eval-samples", 2, "--group-size", 2, "--batch-size", 4)
    return ("--checkpoint", folder / "latent", *group, "--max-new-tokens", 3, "--steps", 4, "--save-every", 2)


@pytest.fixture(autouse=True)
def small_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    from llm_trm.models import tiny
    from tests.train.test_language_model import SMALL

    monkeypatch.setitem(tiny.PRESETS, "tiny", SMALL)


def invoke(kind: str, *words: object) -> Result:
    return CliRunner().invoke(main, ["train", kind, *map(str, words)], prog_name="llm-trm")


@contextmanager
def full_from(monkeypatch: pytest.MonkeyPatch, step: int, size: int = 6000) -> Iterator[None]:
    """From a step of a command on, no file can grow beyond ``size`` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = console.ConsoleReport.step

    def stepped(self: console.ConsoleReport, at: int) -> None:
        before(self, at)
        if at == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))

    with monkeypatch.context() as patch:
        patch.setattr(console.ConsoleReport, "step", stepped)
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("prepare", [puzzle, phase2, lm, lora, phase3])
def test_a_disk_that_fills_up(
    prepare: Callable[[Path], tuple[object, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if prepare in (lm, lora, phase3):
        pytest.importorskip("peft")
    run, kind = tmp_path / "run", prepare.__name__
    options = (*prepare(tmp_path), "-o", run, "--device", "cpu")
    with full_from(monkeypatch, 3):
        full = invoke(kind, *options)
    assert full.exit_code == 2, (full.output, full.exception)
    (line,) = (line for line in full.stderr.splitlines() if line.startswith("llm-trm"))
    assert line.startswith("llm-trm: error: ") and "choose a path on another disk" in line, line
    assert not list(run.rglob("*.llm-trm-tmp"))
    continued = invoke(kind, *options, "--resume")
    assert continued.exit_code == 0, (continued.output, continued.exception)
    assert "resuming" in continued.stdout.lower()
    assert "resuming from the checkpoint before" not in continued.stderr


def test_a_disk_that_fills_up_in_phase1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps(problem.record()) + "\n" for problem in World().problems(40)))
    options = ("--model", save_tiny_model(tmp_path / "model"), "--text", file, "--stage", "1a", "--epochs", 2)
    options += ("--num-tokens", 800, "--batch-size", 64, "--device", "cpu", "-o", tmp_path / "run")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    compute = states.final_states

    def filled(*arguments: Any) -> Any:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, limits[1]))
        return compute(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(states, "final_states", filled)
        try:
            full = invoke("phase1", *options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert full.exit_code == 2, (full.output, full.exception)
    (line,) = (line for line in full.stderr.splitlines() if line.startswith("llm-trm"))
    assert "choose a path on another disk" in line
    assert not [
        path for path in (tmp_path / "run").rglob("*") if path.suffix in (".safetensors", ".llm-trm-tmp")
    ]
    assert invoke("phase1", *options).exit_code == 0


@pytest.mark.parametrize("prepare", [puzzle, phase2, lm])
def test_an_output_that_cannot_be_written(
    prepare: Callable[[Path], tuple[object, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write everywhere, so the refusal is pretended."""
    options = prepare(tmp_path)
    make = Path.mkdir

    def refused(self: Path, *arguments: Any, **more: Any) -> None:
        if self.name == "run":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        make(self, *arguments, **more)

    monkeypatch.setattr(Path, "mkdir", refused)
    done = invoke(prepare.__name__, *options, "-o", tmp_path / "run", "--device", "cpu")
    assert done.exit_code == 2
    words = (
        f"llm-trm: error: {tmp_path / 'run'} cannot be written (Permission denied): choose another folder\n"
    )
    assert done.stderr == words
