"""Tests of puzzle training: its output, resuming, and errors."""

from __future__ import annotations

import multiprocessing
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_trm.data.puzzles.dataset import read_info, read_split, write_puzzles
from llm_trm.errors import InputError
from llm_trm.files import read_json
from llm_trm.models.puzzle.loading import load_puzzle
from llm_trm.train.puzzle.config import configure
from llm_trm.train.puzzle.report import PuzzlePlan
from llm_trm.train.puzzle.trainer import PuzzleTrainer
from llm_trm.train.run.report import Report
from tests.killing import check_kills
from tests.puzzle import worker
from tests.puzzle.toy import content_of, toy_config, write_toy


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy"))


class Listener(Report):
    def __init__(self) -> None:
        self.plan: PuzzlePlan | None = None
        self.steps: list[int] = []
        self.records: list[Any] = []

    def begin(self, plan: PuzzlePlan) -> None:
        self.plan = plan

    def step(self, step: int) -> None:
        self.steps.append(step)

    def evaluated(self, record: Any) -> None:
        self.records.append(record)


def test_a_run_learns_and_leaves_its_best_averaged_weights(toy: Path, tmp_path: Path) -> None:
    report = Listener()
    config = toy_config(toy, output=tmp_path, steps=200, eval_every=50, log_every=10, max_steps=2)
    trainer = PuzzleTrainer(config, report)
    result = trainer.train()
    assert report.plan is not None and (report.plan.training, report.plan.evaluated) == (60, 20)
    assert report.steps == list(range(1, 201))
    first, *_, last = report.records
    assert last["train"]["loss"] < 0.5 * first["train"]["loss"]
    assert last["test"]["cells"] > 0.8
    assert set(last["train"]) >= {"exact", "cells", "halted", "halt_right", "samples_per_second"}
    assert trainer.model.puzzle_emb.weights.abs().sum() > 0
    assert len(list((tmp_path / "checkpoints").iterdir())) <= config.keep + 1
    model, facts = load_puzzle(tmp_path)
    assert facts["task"] == "arc" and (facts["rows"], facts["columns"]) == (3, 3)
    assert read_json(tmp_path / "config.json", "")["steps"] == 200
    with trainer.average.applied():
        names = {**dict(trainer.model.named_parameters())}
        if result.best.name == "step-00000200":
            for name, parameter in model.named_parameters():
                assert torch.equal(parameter, names[name]), name


def test_every_parameter_moves(toy: Path, tmp_path: Path) -> None:
    trainer = PuzzleTrainer(toy_config(toy, output=tmp_path))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    rates = []
    for _ in range(6):
        trainer.take_step()
        rates.append(float(trainer.optimizer.param_groups[0]["lr"]))
    for name, parameter in trainer.model.named_parameters():
        # The second output of the Q-head is unused, but decays.
        assert not torch.equal(parameter, before[name]), name
    assert rates == pytest.approx([1e-2 / 3, 2e-2 / 3, *[1e-2] * 4])


def test_augmentation_and_order_follow_the_seed(toy: Path, tmp_path: Path) -> None:
    runs = [PuzzleTrainer(toy_config(toy, output=tmp_path / str(seed), seed=seed)) for seed in (0, 0, 1)]
    batches = [trainer.feed.batch(trainer.run.step)[0] for trainer in runs]
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])


def test_a_batch_larger_than_the_data(toy: Path, tmp_path: Path) -> None:
    trainer = PuzzleTrainer(toy_config(toy, output=tmp_path, batch_size=100))
    assert trainer.feed.batch(trainer.run.step)[0].shape == (100, 9)


def test_killed_at_random_moments_ends_with_the_same_weights(toy: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.puzzle.worker"])
    options = {"steps": 30, "eval_every": 10, "save_every": 3, "schedule": "cosine"}

    def start(output: Path) -> BaseProcess:
        process = context.Process(target=worker.run, args=(toy, output, options))
        process.start()
        return process

    check_kills(start, content_of, tmp_path, kills=5)


def test_refusals(toy: Path, tmp_path: Path) -> None:
    config = toy_config(toy, output=tmp_path / "run", steps=6)
    with pytest.raises(InputError, match="no checkpoint to resume"):
        PuzzleTrainer(toy_config(toy, output=tmp_path / "run", resume=True))
    PuzzleTrainer(config).train()
    with pytest.raises(InputError, match="--resume, replace it with --overwrite"):
        PuzzleTrainer(config)
    with pytest.raises(InputError, match="batch_size was 8 and is 4"):
        PuzzleTrainer(toy_config(toy, output=tmp_path / "run", resume=True, batch_size=4))
    with pytest.raises(InputError, match="llm-trm data"):
        PuzzleTrainer(toy_config(tmp_path / "nothing"))
    with pytest.raises(InputError, match="needs a GPU"):
        PuzzleTrainer(toy_config(toy, output=tmp_path / "other", nograd_precision="fp8"))
    with pytest.raises(InputError, match="--heads 3 does not divide"):
        toy_config(toy, n_heads=3)
    with pytest.raises(InputError, match="choose --positions none instead of --positions rope"):
        toy_config(toy, mixer="tokens", positions="rope")
    with pytest.raises(InputError, match="larger --puzzle-len"):
        toy_config(toy, puzzle_len=1)
    with pytest.raises(InputError, match="even size, not 3"):
        toy_config(toy, d_model=12, n_heads=4)
    toy_config(toy, d_model=12, n_heads=4, positions="learned")
    with pytest.raises(InputError, match="choose one"):
        toy_config(toy, resume=True, overwrite=True)


def test_evaluates_on_puzzles_with_answers_from_the_whole_split(toy: Path, tmp_path: Path) -> None:
    split = read_split(toy, "test")
    split.labels[::2] = 0
    write_puzzles(tmp_path / "data", read_info(toy), {"train": read_split(toy, "train"), "test": split})
    few, all_of_them = (
        PuzzleTrainer(toy_config(tmp_path / "data", eval_samples=samples)).inputs.held_out
        for samples in (4, 100)
    )
    assert torch.equal(all_of_them.inputs, split.inputs[1::2])
    assert len(few) == 4 and not torch.equal(few.inputs, all_of_them.inputs[:4])
    assert few.labels.any(-1).all()


def test_non_finite_loss_is_reported(toy: Path, tmp_path: Path) -> None:
    trainer = PuzzleTrainer(toy_config(toy, output=tmp_path, steps=4, eval_every=4, log_every=1))
    with torch.no_grad():
        trainer.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="choose a lower --learning-rate"):
        trainer.train()


def test_presets_give_defaults(tmp_path: Path) -> None:
    paper = configure("paper", "sudoku", data=tmp_path, output=tmp_path)
    assert (paper.mixer, paper.positions, paper.d_model, paper.batch_size) == ("tokens", "none", 512, 768)
    assert (paper.steps, paper.optimizer, paper.clip_norm) == (65_100, "adam-atan2", None)
    maze = configure("paper", "maze", data=tmp_path, output=tmp_path)
    assert (maze.mixer, maze.positions, maze.n_latent_steps) == ("attention", "rope", 4)
    changed = configure("paper", "sudoku", data=tmp_path, output=tmp_path, mixer="attention", steps=None)
    assert (changed.mixer, changed.positions, changed.steps) == ("attention", "rope", 65_100)
    assert configure("tiny", "sudoku", data=tmp_path, output=tmp_path, d_model=32).d_model == 32
