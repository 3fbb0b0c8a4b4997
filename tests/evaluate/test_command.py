"""Tests of ``llm-trm eval phase2``: a complete evaluation, and errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from llm_trm.cli import main
from llm_trm.data.pairs import PairFiles
from llm_trm.models.compression import DimensionCompressor, save_compressor
from llm_trm.models.phase2 import COMPRESSOR_FOLDER
from llm_trm.models.sequence_trm import SequenceTRM, save_sequence_trm
from llm_trm.models.tiny import tiny_language_model, tiny_tokenizer
from tests.evaluate.sample import write_pairs

pytest.importorskip("transformers")

WIDTH, D_COMPRESSED = 128, 8


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["eval", "phase2", "--device", "cpu", *arguments], prog_name="llm-trm")


class World:
    """An untrained language model, pairs to train and evaluate on, and a checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tokenizer = tiny_tokenizer()
        self.model = folder / "lm"
        tiny_language_model(tokenizer).save_pretrained(self.model)
        tokenizer.save_pretrained(self.model)
        self.train = self.pairs("train", 20, seed=1)
        self.test = self.pairs("test", 9, seed=2)
        self.checkpoint = folder / "run"
        self.checkpoint.mkdir()
        trm = SequenceTRM(D_COMPRESSED, n_layers=1, n_heads=1, n_latent_steps=1, n_deep_recursions=1)
        facts = {
            "data": str(self.train.folder),
            "pairs": self.train.settings,
            "max_steps": 3,
            "halting": "none",
        }
        save_sequence_trm(trm, self.checkpoint, **facts)
        save_compressor(DimensionCompressor(WIDTH, D_COMPRESSED), self.checkpoint / COMPRESSOR_FOLDER)

    def pairs(self, name: str, samples: int, seed: int, width: int = WIDTH) -> PairFiles:
        return write_pairs(self.folder / name, samples=samples, seed=seed, width=width, model=str(self.model))

    def evaluate(self, *arguments: str, data: Path | None = None) -> Result:
        return run("--checkpoint", str(self.checkpoint), "--data", str(data or self.test.folder), *arguments)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.manual_seed(0)
    return World(tmp_path_factory.mktemp("world"))


def test_table_file_and_text_agree(shared: World, tmp_path: Path) -> None:
    output = tmp_path / "phase2.json"
    result = shared.evaluate("--by", "operations", "-o", str(output))
    assert result.exit_code == 0, result.stderr
    found = json.loads(output.read_text())
    assert list(found["rows"]) == [
        "TRM",
        "last context state",
        "training mean",
        "ridge regression",
        "true state",
    ]
    trm = found["rows"]["TRM"]
    assert trm["pairs"] == 9
    assert trm["steps"] == found["max_steps"] == 3
    assert found["rows"]["true state"]["cosine"] == pytest.approx(1.0)
    assert list(found["groups"]) == ["1", "2", "3"]
    assert found["versions"]["torch"] == torch.__version__
    assert f"{trm['cosine']:.4f}" in result.stdout
    low, high = trm["rank1_interval"]
    assert f"{trm['rank1']:.1%} [{100 * low:.1f}, {100 * high:.1f}]" in result.stdout
    assert "by operations" in result.stdout
    assert f"regularisation {found['ridge_strength']:g}" in result.stdout


def test_metrics_do_not_depend_on_the_batch_size(shared: World, tmp_path: Path) -> None:
    found = []
    for size in ("1", "64"):
        assert shared.evaluate("--batch-size", size, "-o", str(tmp_path / size)).exit_code == 0
        trm = json.loads((tmp_path / size).read_text())["rows"]["TRM"]
        found.append([trm[name] for name in ("cosine", "mse", "relative_error", "full_cosine", "steps")])
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_options_reach_the_evaluation(shared: World, tmp_path: Path) -> None:
    output = tmp_path / "phase2.json"
    options = ("--no-baselines", "--max-steps", "2", "-o", str(output))
    assert shared.evaluate(*options).exit_code == 0
    found = json.loads(output.read_text())
    assert list(found["rows"]) == ["TRM", "true state"]
    assert found["rows"]["TRM"]["steps"] == 2
    other = shared.pairs("other", 30, seed=5)
    assert shared.evaluate("--train-data", str(other.folder), "-o", str(output), "--overwrite").exit_code == 0
    assert json.loads(output.read_text())["train_data"] == str(other.folder)


def one_line(result: Result, *words: str) -> None:
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


def test_training_data_is_refused_unless_allowed(shared: World, tmp_path: Path) -> None:
    output = tmp_path / "phase2.json"
    copy = tmp_path / "copy"
    shutil.copytree(shared.train.folder, copy)
    one_line(shared.evaluate("-o", str(output), data=copy), str(copy), "20 of its 20", "--split test")
    assert not output.exists()
    assert shared.evaluate("--allow-training-data", "-o", str(output), data=copy).exit_code == 0


def test_baselines_are_not_fitted_on_evaluation_data(shared: World, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(shared.test.folder, copy)
    for folder in (shared.test.folder, copy):
        result = shared.evaluate("--train-data", str(folder))
        one_line(result, "9 of the 9 problems", str(folder), "which the baselines are fitted on")
    assert shared.evaluate("--train-data", str(copy), "--allow-training-data").exit_code == 0


def test_missing_training_data_is_recognised_by_fingerprint(tmp_path: Path) -> None:
    world = World(tmp_path)
    settings = world.train.settings | {"problems_sha256": "0123"}
    for folder, pairs in ((tmp_path / "copy", world.test), (world.train.folder, world.train)):
        if folder != pairs.folder:
            shutil.copytree(pairs.folder, folder)
        index = json.loads((folder / "pairs.json").read_text())
        (folder / "pairs.json").write_text(json.dumps(index | {"settings": settings}))
    described = json.loads((world.checkpoint / "trm.json").read_text())
    described["facts"] |= {"data": str(tmp_path / "gone"), "pairs": settings}
    (world.checkpoint / "trm.json").write_text(json.dumps(described))
    one_line(world.evaluate(data=tmp_path / "copy"), "trained on", "--allow-training-data")
    one_line(world.evaluate(), str(tmp_path / "gone"), "--train-data", "--no-baselines")
    assert world.evaluate("--no-baselines").exit_code == 0


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda w: (w.test.folder / "pairs.json").unlink(), ("pairs.json", "datagen")),
        (lambda w: cut(w.test.folder / "shard-00001.safetensors"), ("shard-00001.safetensors", "datagen")),
        (lambda w: (w.checkpoint / "trm.safetensors").unlink(), ("trm.safetensors", "train phase2")),
        (lambda w: shutil.rmtree(w.checkpoint), ("run", "train phase2")),
        (lambda w: shutil.rmtree(w.model), ("lm", "cannot be loaded")),
    ],
)
def test_broken_input_gets_one_line(
    tmp_path: Path, break_it: Callable[[World], object], words: tuple[str, ...]
) -> None:
    world = World(tmp_path)
    break_it(world)
    one_line(world.evaluate("-o", str(tmp_path / "out.json")), *words)
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--batch-size", "0"), ("--batch-size",)),
        (("--halting", "never"), ("--halting", "sample")),
        (("--by", "colour"), ("--by colour", "no record")),
        (("--output", "/no/such/folder/x.json"), ("--output", "does not exist")),
    ],
)
def test_nonsense_gets_one_line(shared: World, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    one_line(shared.evaluate(*arguments), *words)


def test_pairs_of_another_width_are_refused(shared: World) -> None:
    narrow = shared.pairs("narrow", 6, seed=3, width=64)
    one_line(shared.evaluate(data=narrow.folder), "64", "128")


def test_too_few_training_pairs_are_refused(shared: World) -> None:
    few = shared.pairs("few", 3, seed=4)
    one_line(shared.evaluate("--train-data", str(few.folder)), "3 pairs", "--no-baselines")


def test_data_must_be_named() -> None:
    one_line(run(), "--data")
