"""Tests that changed training data is detected by its content, and rejected or reported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from llm_trm.cli import main
from llm_trm.data.puzzles.dataset import PuzzleSplit, read_info, read_split, repeated, write_puzzles
from llm_trm.errors import InputError
from llm_trm.manifest import MANIFEST_FILE
from llm_trm.train.puzzle.trainer import PuzzleTrainer
from llm_trm.train.run.checkpoints import Checkpoints
from tests.puzzle.toy import toy_config, write_toy

#: A model without puzzle embeddings.
PLAIN = {"puzzle_dim": 0, "puzzle_len": 0}


def rewrite(folder: Path, change: Callable[[PuzzleSplit], PuzzleSplit]) -> None:
    """Rewrite the training puzzles of ``folder``."""
    splits = {"train": change(read_split(folder, "train")), "test": read_split(folder, "test")}
    write_puzzles(folder, read_info(folder), splits)


def reordered(split: PuzzleSplit) -> PuzzleSplit:
    return PuzzleSplit(split.inputs.flip(0), split.labels.flip(0), split.puzzles.flip(0))


def renumbered(split: PuzzleSplit) -> PuzzleSplit:
    return PuzzleSplit(split.inputs, split.labels, 4 - split.puzzles)


def swapped(split: PuzzleSplit) -> PuzzleSplit:
    """Swap two cells of a question: different puzzles with the same count and sum."""
    inputs = split.inputs.clone()
    inputs[:, :2] = inputs[:, :2].flip(1)
    return PuzzleSplit(inputs, split.labels, split.puzzles)


CHANGES = pytest.mark.parametrize("change", [reordered, renumbered, swapped])


@CHANGES
def test_digests_see_every_place(change: Callable[[PuzzleSplit], PuzzleSplit], tmp_path: Path) -> None:
    split = read_split(write_toy(tmp_path), "train")
    assert split.digest() == read_split(tmp_path, "train").digest()
    assert change(split).digest() != split.digest()
    assert change(change(split)).digest() == split.digest()


def test_repeated_questions() -> None:
    learned = torch.tensor([[1, 2], [3, 4], [5, 6]], dtype=torch.uint8)
    asked = torch.tensor([[3, 4], [2, 1], [3, 4]], dtype=torch.uint8)
    splits = [PuzzleSplit(inputs, inputs, torch.zeros(3, dtype=torch.int32)) for inputs in (asked, learned)]
    assert repeated(*splits) == 2 and repeated(splits[1], splits[1]) == 3
    wide = PuzzleSplit(asked.reshape(2, 3), asked.reshape(2, 3), torch.zeros(2, dtype=torch.int32))
    assert repeated(wide, splits[1]) == 0


def trained(folder: Path, **options: object) -> Path:
    """Run three steps on the toy in ``folder``."""
    PuzzleTrainer(toy_config(folder, steps=3, eval_every=3, **options)).train()
    return folder / "run"


def make_old(run: Path) -> None:
    """Remove the checksums, and the data digests, from the checkpoints of a run, as in older checkpoints."""
    data = read_split(run.parent, "train")
    tokens = int(data.inputs.sum()) + int(data.labels.sum())
    folder = Checkpoints(run).last
    for path in (folder / "state.json", folder / "puzzle_trm.json"):
        content = json.loads(path.read_text())
        settings = content["settings"] if "settings" in content else content["facts"]["settings"]
        settings["data"] = {"task": "arc", "puzzles": len(data), "tokens": tokens}
        path.write_text(json.dumps(content))
    (folder / MANIFEST_FILE).unlink()


@CHANGES
def test_run_resumes_only_with_its_own_data(
    change: Callable[[PuzzleSplit], PuzzleSplit], tmp_path: Path
) -> None:
    trained(write_toy(tmp_path))
    resumed = toy_config(tmp_path, steps=6, eval_every=3, resume=True)
    settings = PuzzleTrainer(toy_config(tmp_path, steps=3, eval_every=3, resume=True)).settings
    assert len(settings["data"]["train"]) == 16
    rewrite(tmp_path, change)
    for config in (resumed, toy_config(tmp_path, steps=3, eval_every=3, resume=True)):
        with pytest.raises(InputError, match=r"data was .* and is .*--overwrite"):
            PuzzleTrainer(config)


def test_run_resumes_only_with_its_own_tests(tmp_path: Path) -> None:
    trained(write_toy(tmp_path))
    splits = {"train": read_split(tmp_path, "train"), "test": reordered(read_split(tmp_path, "test"))}
    write_puzzles(tmp_path, read_info(tmp_path), splits)
    with pytest.raises(InputError, match="data was"):
        PuzzleTrainer(toy_config(tmp_path, steps=3, eval_every=3, resume=True))


def test_older_runs_start_again(tmp_path: Path) -> None:
    make_old(trained(write_toy(tmp_path)))
    with pytest.raises(InputError, match=r"was started before checkpoints identified .*--overwrite"):
        PuzzleTrainer(toy_config(tmp_path, steps=3, eval_every=3, resume=True))


def evaluate(run: Path, *arguments: str | Path) -> Result:
    words = ["eval", "puzzle", "--device", "cpu", "--halting", "--checkpoint", *map(str, (run, *arguments))]
    return CliRunner().invoke(main, words, prog_name="llm-trm")


def refused(result: Result, *words: str) -> None:
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and not result.stdout, result.output
    for word in words:
        assert word in result.stderr


def mazes(folder: Path) -> Path:
    """The toy as a task that, unlike ARC, is evaluated without a key file."""
    info = replace(read_info(write_toy(folder)), task="maze")
    write_puzzles(folder, info, {name: read_split(folder, name) for name in ("train", "test")})
    return folder


@CHANGES
def test_embeddings_belong_to_the_puzzles_of_training(
    change: Callable[[PuzzleSplit], PuzzleSplit], tmp_path: Path
) -> None:
    data = mazes(tmp_path / "data")
    run = trained(data)
    shutil.copytree(data, tmp_path / "copy")
    for arguments in ((), ("--data", tmp_path / "copy")):
        result = evaluate(run, *arguments)
        assert result.exit_code == 0 and not result.stderr, result.output
    rewrite(data, change)
    refused(evaluate(run), "differ, in content or order", "--data")
    refused(evaluate(run, "--data", data), "differ, in content or order")
    assert evaluate(run, "--data", tmp_path / "copy").exit_code == 0
    rewrite(data, change)
    make_old(run)
    refused(evaluate(run), "may have another order", "train it again")


def test_rewritten_puzzles_may_be_training_puzzles(tmp_path: Path) -> None:
    data = mazes(tmp_path / "data")
    run = trained(data, **PLAIN)
    result = evaluate(run)
    assert result.exit_code == 0 and not result.stderr, result.output
    other = mazes(tmp_path / "other")
    learned = read_split(data, "train")
    # Five puzzles, one of them twice, and four that were not trained on.
    inputs = torch.cat((learned.inputs[:5], learned.inputs[:1], learned.inputs.flip(1)[5:9]))
    mixed = PuzzleSplit(inputs, learned.labels[:10], learned.puzzles[:10])
    write_puzzles(other, read_info(other), {"train": read_split(other, "test"), "test": mixed})
    result = evaluate(run, "--data", other)
    assert result.exit_code == 0, result.output
    assert "6 of 10 test puzzles are among those that the model was trained on" in result.stderr
    make_old(run)
    assert evaluate(run).exit_code == 0
    rewrite(data, swapped)
    shutil.rmtree(run)
    run = trained(data, **PLAIN)
    rewrite(data, reordered)
    refused(evaluate(run), "has changed since the model was trained", "restore it")
    result = evaluate(run, "--data", other)
    assert result.exit_code == 0 and "has been rewritten: these puzzles may have been" in result.stderr
    (data / "dataset.json").unlink()
    result = evaluate(run, "--data", other)
    assert result.exit_code == 0 and "no longer exists: these puzzles may have been" in result.stderr


def test_training_reports_repeated_test_puzzles(tmp_path: Path) -> None:
    data = mazes(tmp_path / "data")
    learned = read_split(data, "train")
    test = PuzzleSplit(learned.inputs[:4], learned.labels[:4], learned.puzzles[:4])
    write_puzzles(data, read_info(data), {"train": learned, "test": test})
    words = ["train", "puzzle", "--data", str(data), "-o", str(tmp_path / "run"), "--steps", "2"]
    sizes = ["--d-model", "16", "--heads", "2", "--layers", "1", "--batch-size", "4", "--device", "cpu"]
    result = CliRunner().invoke(main, [*words, *sizes, "--no-augment"])
    assert result.exit_code == 0, result.output
    assert "4 test puzzles are also trained on" in result.output
