"""Checksums of data files: every flipped bit is found, once per process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from llm_trm import checksums
from llm_trm.cli import main
from llm_trm.data.pairs import damaged_shards, open_pairs
from llm_trm.data.puzzles.arc_folder import read_arc
from llm_trm.data.puzzles.dataset import read_split
from llm_trm.errors import InputError
from llm_trm.train.phase1.states import StateFiles, collect_states, is_complete, write_index
from tests.data.flips import every_flip_is_refused, flip


def run(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="llm-trm")
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def arc(tmp_path: Path) -> Path:
    pairs = [{"input": [[number, 0], [2, 1]], "output": [[number]]} for number in (1, 2, 3)]
    (tmp_path / "task.json").write_text(json.dumps({"train": pairs[:2], "test": pairs[2:]}))
    run("data", "arc", tmp_path / "task.json", "--augment", 1, "-o", tmp_path / "arc")
    return tmp_path / "arc"


@pytest.fixture
def pairs(tmp_path: Path, model_folder: Path) -> Path:
    _generate(tmp_path / "pairs", model_folder)
    return tmp_path / "pairs"


def _generate(folder: Path, model_folder: Path) -> None:
    sizes = ("--num-samples", 12, "--max-new-tokens", 30, "--shard-size", 6, "--seed", 1)
    run("datagen", "--model", model_folder, "--device", "cpu", *sizes, "-o", folder)


@pytest.fixture
def states(tmp_path: Path, model: Any) -> Path:
    sequences = [torch.arange(1, 5), torch.arange(2, 9)]
    collect_states(model, sequences, tmp_path / "states")
    assert not is_complete(sequences, tmp_path / "states")
    write_index(model, sequences, tmp_path / "states")
    assert is_complete(sequences, tmp_path / "states")
    return tmp_path / "states"


def test_flips_in_puzzles(arc: Path) -> None:
    for name in ("train", "test"):
        path = arc / f"{name}.safetensors"
        every_flip_is_refused(path, lambda name=name: read_split(arc, name), step=37)
    every_flip_is_refused(arc / "arc.json", lambda: read_arc(arc), step=11)


def test_flips_in_pairs(pairs: Path) -> None:
    def read() -> None:
        list(open_pairs(pairs).shards())

    every_flip_is_refused(pairs / "shard-00000.safetensors", read, step=97)
    every_flip_is_refused(pairs / "shard-00001.jsonl", read, step=31)
    every_flip_is_refused(pairs / "shard-00001.jsonl", lambda: list(open_pairs(pairs).records()), step=31)


def test_flips_in_states(states: Path) -> None:
    path = states / "states-00000.safetensors"
    every_flip_is_refused(path, lambda: StateFiles.open(states).shard(0), step=17)


def test_the_same_command_repairs_pairs(pairs: Path, model_folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in pairs.iterdir()}
    assert damaged_shards(pairs, range(3)) == set()
    flip(pairs / "shard-00000.safetensors", -1)
    flip(pairs / "shard-00001.jsonl", 9)
    assert damaged_shards(pairs, range(3)) == {0, 1}
    assert damaged_shards(pairs, [1]) == {1}
    _generate(pairs, model_folder)
    assert {path.name: path.read_bytes() for path in pairs.iterdir()} == before


def _without(path: Path, *keys: str) -> None:
    """Remove entries of an index, as an older version wrote it."""
    index = json.loads(path.read_text())
    for entry in (index, *index.get("shards", ())):
        for key in keys:
            entry.pop(key, None)
    path.write_text(json.dumps(index))


def test_folders_of_older_versions_still_open(arc: Path, pairs: Path, states: Path) -> None:
    _without(arc / "dataset.json", "sha256")
    _without(pairs / "pairs.json", "sha256", "metadata_sha256")
    _without(states / "states.json", "sha256")
    read_arc(arc)
    read_split(arc, "train")
    assert len(list(open_pairs(pairs).shards())) == 2
    StateFiles.open(states).shard(0)
    assert damaged_shards(pairs, range(2)) == set()


@pytest.mark.parametrize("value", [5, ["a"], {"a": 1}, "", "0" * 64])
def test_wrong_checksums_are_refused(value: Any, arc: Path, pairs: Path, states: Path) -> None:
    def change(path: Path, entry: Callable[[Any], dict[str, Any]], key: str) -> None:
        index = json.loads(path.read_text())
        entry(index)[key] = value
        path.write_text(json.dumps(index))

    change(arc / "dataset.json", lambda index: index["sha256"], "train.safetensors")
    change(pairs / "pairs.json", lambda index: index["shards"][0], "sha256")
    change(states / "states.json", lambda index: index["shards"][0], "sha256")
    for read in (
        lambda: read_split(arc, "train"),
        lambda: list(open_pairs(pairs).shards()),
        lambda: StateFiles.open(states).shard(0),
    ):
        with pytest.raises(InputError, match="checksum"):
            read()
    change(arc / "dataset.json", lambda index: index, "sha256")
    with pytest.raises(InputError, match=r"dataset\.json"):
        read_split(arc, "train")


def test_a_process_checks_a_file_once(arc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    digest = checksums.file_digest

    def count(path: Path) -> str:
        checked.append(path.name)
        return digest(path)

    monkeypatch.setattr(checksums, "file_digest", count)
    for _ in range(3):
        read_split(arc, "train")
    assert checked == ["train.safetensors"]


def test_a_file_is_hashed_once_whatever_the_remedy_and_again_after_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"whole")
    digest = checksums.file_digest(path)
    checksums.require_unchanged(path, None, "")
    checksums.require_unchanged(path, digest, "do this")
    flip(path, 0)
    for remedy in ("do this", "do that"):
        with pytest.raises(InputError, match=f"a has changed .* {remedy}"):
            checksums.require_unchanged(path, digest, remedy)
    assert not checksums.is_unchanged(path, digest)
    assert not checksums.is_unchanged(path, [digest])
    flip(path, 0)
    checksums.require_unchanged(path, digest, "do this")
    monkeypatch.setattr(checksums, "file_digest", None)
    checksums.require_unchanged(path, digest, "do that")
