"""Two trainings in one folder: one of them goes on, and the other ends with one line."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from click.testing import CliRunner

from llm_trm.claims import LOCK_FILE, claimed
from llm_trm.cli import main
from llm_trm.data.processes import main_process
from llm_trm.errors import InputError
from llm_trm.train.phase1.config import Phase1Config
from llm_trm.train.phase2.trainer import TRMSequenceTrainer
from llm_trm.train.puzzle.trainer import PuzzleTrainer
from tests.killing import finished
from tests.puzzle import toy as puzzles
from tests.train import toy as contexts
from tests.train import worker

Build = Callable[..., PuzzleTrainer | TRMSequenceTrainer]


def puzzle(folder: Path, **options: object) -> PuzzleTrainer:
    return PuzzleTrainer(puzzles.toy_config(folder, **options))


def phase2(folder: Path, **options: object) -> TRMSequenceTrainer:
    return TRMSequenceTrainer(contexts.toy_config(folder, **options))


@pytest.fixture(params=["puzzle", "phase2"])
def build(request: pytest.FixtureRequest, tmp_path: Path) -> Build:
    module, found = {"puzzle": (puzzles, puzzle), "phase2": (contexts, phase2)}[request.param]
    module.write_toy(tmp_path)
    return found


def test_of_two_processes_one_is_refused(build: Build, tmp_path: Path) -> None:
    context: ForkServerContext = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.train.worker"])
    held = context.Process(target=worker.hold, args=(tmp_path, build.__name__))
    held.start()
    while not (tmp_path / "held").exists():
        assert held.exitcode is None
        time.sleep(0.05)
    with pytest.raises(InputError, match=rf"run is in use by process {held.pid} on .*: wait until it ends"):
        build(tmp_path, overwrite=True).train()
    (tmp_path / "go").touch()
    assert finished([held]) == [0]
    assert not (tmp_path / "run" / LOCK_FILE).exists()
    build(tmp_path, resume=True).train()


def test_a_run_in_use_is_named_and_not_its_checkpoints(build: Build, tmp_path: Path) -> None:
    """They come and go while the other process trains, so that the newest may be missing."""
    build(tmp_path).train()
    for path in tmp_path.glob("run/checkpoints/*"):
        shutil.rmtree(path)
    with claimed(tmp_path / "run"), pytest.raises(InputError, match="run is in use by process"):
        build(tmp_path, resume=True)
    with pytest.raises(InputError, match="does not exist: start over"):
        build(tmp_path, resume=True)
    assert not (tmp_path / "run" / LOCK_FILE).exists()


def test_what_changed_after_a_look_is_seen(build: Build, tmp_path: Path) -> None:
    """Another process trained between a trainer's construction and its start."""
    late = build(tmp_path)
    build(tmp_path, **({"steps": 6} if build is puzzle else {"epochs": 1})).train()
    with pytest.raises(InputError, match="already contains a run"):
        late.train()
    longer = {"steps": 12, "eval_every": 3} if build is puzzle else {"epochs": 3}
    for path in tmp_path.glob("run/index.json"):
        path.unlink()
    build(tmp_path, overwrite=True, **longer).train()
    index = (tmp_path / "run" / "index.json").read_text()
    late = build(tmp_path, resume=True, **longer)
    (tmp_path / "run" / "index.json").write_text(index.replace('"best"', '"was": 1, "best"'))
    with pytest.raises(InputError, match="has been continued by another process: run the same command again"):
        late.train()


def test_a_refused_run_leaves_no_folder(build: Build, tmp_path: Path) -> None:
    wrong = {"nograd_precision": "fp8"} if build is puzzle else {"batch_size": 10_000}
    with pytest.raises(InputError):
        build(tmp_path, output=tmp_path / "new" / "run", **wrong)
    build(tmp_path, output=tmp_path / "new" / "run")
    assert not (tmp_path / "new").exists()


def test_trainers_runs_and_phase1_are_refused_before_they_load_anything(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from llm_trm.train.lm.config import LanguageModelConfig
    from llm_trm.train.lm.train import train_language_model
    from llm_trm.train.lora.config import LoraTrainingConfig
    from llm_trm.train.lora.train import train_lora
    from llm_trm.train.phase1.trainer import CompressorPretrainer

    run = tmp_path / "run"
    with claimed(run):
        for start in (
            lambda: train_language_model(LanguageModelConfig(run)),
            lambda: train_lora(LoraTrainingConfig("nothing.jsonl", output=run)),
            lambda: CompressorPretrainer(Phase1Config(run, str(tmp_path / "nothing"))).train(),
        ):
            with pytest.raises(InputError, match="run is in use by process"):
                start()
    assert not run.exists()
    with pytest.raises(InputError, match=r"nothing\.jsonl"):
        train_lora(LoraTrainingConfig("nothing.jsonl", output=run))
    with pytest.raises(InputError, match="nothing"):
        CompressorPretrainer(Phase1Config(run, str(tmp_path / "nothing"), device="cpu")).train()
    assert not run.exists()


def test_only_the_main_process_of_a_launch_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with claimed(tmp_path):
        monkeypatch.setenv("RANK", "1")
        with claimed(tmp_path, main=main_process()):
            pass
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(InputError, match="in use"), claimed(tmp_path, main=main_process()):
            pass


def test_the_second_command_ends_with_one_line(tmp_path: Path) -> None:
    contexts.write_toy(tmp_path)
    paths = ("--data", tmp_path / "pairs", "--compressor", tmp_path / "compressor", "-o", tmp_path / "run")
    words = ["train", "phase2", *map(str, paths), "--device", "cpu", "--overwrite"]
    with claimed(tmp_path / "run"):
        done = CliRunner().invoke(main, words, prog_name="llm-trm")
    assert done.exit_code == 2
    assert done.stderr.startswith(f"llm-trm: error: {tmp_path / 'run'} is in use by process {os.getpid()} on")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
