"""Tests of writing and reading pair files, and of errors for invalid ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_trm.data.pairs import RECORD, Pair, open_pairs, record_features, write_index, write_shard
from llm_trm.errors import InputError

WIDTH = 6


def _pair(index: int, length: int) -> Pair:
    record: dict[str, Any] = dict.fromkeys(RECORD) | {
        "index": index,
        "problem": "ü\u2028?",
        "context_length": length,
    }
    return Pair(torch.randn(length, WIDTH), torch.randn(WIDTH), record)


def _write(folder: Path, dtype: str = "float32") -> list[Pair]:
    """Write three shards with 2, 0 and 1 pairs."""
    pairs = [_pair(0, 4), _pair(2, 1), _pair(5, 3)]
    write_shard(folder, 0, pairs[:2], {"no_think": [1]}, WIDTH, dtype)
    write_shard(folder, 1, [], {"no_think": [3], "no_end_think": [4]}, WIDTH, dtype)
    write_shard(folder, 2, pairs[2:], {}, WIDTH, dtype)
    write_index(folder, 3, model="m", seed=7, settings={"temperature": 0.5})
    return pairs


def test_pairs_come_back(tmp_path: Path) -> None:
    pairs = _write(tmp_path)
    found = open_pairs(tmp_path, WIDTH)
    assert (found.samples, found.rows, found.hidden_size, found.dtype) == (3, 8, WIDTH, "float32")
    assert (found.model, found.seed, found.settings) == ("m", 7, {"temperature": 0.5})
    assert found.failures == {"no_end_think": 1, "no_think": 2}
    shards = list(found.shards())
    assert [shard.path.name for shard in shards] == [f"shard-0000{i}.safetensors" for i in range(3)]
    back = [
        (shard.hidden_pre[start:stop], shard.hidden_post[i], shard.records[i])
        for shard in shards
        for i, (start, stop) in enumerate(
            zip(shard.offsets.tolist(), shard.offsets[1:].tolist(), strict=False)
        )
    ]
    assert len(back) == len(pairs)
    for (pre, post, record), pair in zip(back, pairs, strict=True):
        assert torch.equal(pre, pair.hidden_pre)
        assert torch.equal(post, pair.hidden_post)
        assert record == pair.record
    assert [record["index"] for record in found.records()] == [0, 2, 5]


def test_bfloat16_is_stored_as_such(tmp_path: Path) -> None:
    pairs = _write(tmp_path, "bfloat16")
    found = open_pairs(tmp_path)
    assert found.dtype == "bfloat16"
    first = next(found.shards())
    assert torch.equal(first.hidden_pre[:4], pairs[0].hidden_pre.bfloat16())


def test_same_pairs_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        torch.manual_seed(0)
        _write(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(files) == 7
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_records_load_with_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    _write(tmp_path)
    files = str(tmp_path / "shard-*.jsonl")

    def load(**options: Any) -> Any:
        return datasets.load_dataset(
            "json", data_files=files, split="train", cache_dir=str(tmp_path / "cache"), **options
        )

    loaded = load()
    assert loaded.column_names == list(RECORD)
    assert loaded["index"] == [0, 2, 5]
    assert loaded["context_length"] == [4, 1, 3]

    known = _pair(7, 2)
    known.record.update(answer="8", correct=True)
    write_shard(tmp_path, 2, [known], {}, WIDTH, "float32")
    loaded = load(features=record_features())
    assert loaded["correct"] == [None, None, True], "the first shard has only nulls"
    assert loaded["answer"] == [None, None, "8"]


def test_one_shard_is_read_at_a_time(tmp_path: Path) -> None:
    _write(tmp_path)
    shards = open_pairs(tmp_path).shards()
    next(shards)
    (tmp_path / "shard-00001.safetensors").unlink()
    with pytest.raises(InputError, match="shard-00001"):
        next(shards)


def _change_index(folder: Path, **changes: Any) -> None:
    index = json.loads((folder / "pairs.json").read_text())
    (folder / "pairs.json").write_text(json.dumps(index | changes))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def _replace(folder: Path, **tensors: torch.Tensor) -> None:
    path = folder / "shard-00002.safetensors"
    save_file(load_file(path) | tensors, path)
    index = json.loads((folder / "pairs.json").read_text())
    index["shards"][2]["bytes"] = path.stat().st_size
    (folder / "pairs.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda f: (f / "pairs.json").unlink(), ("pairs.json", "does not exist", "datagen")),
        (lambda f: (f / "pairs.json").write_text("{"), ("pairs.json", "cannot be read")),
        (lambda f: (f / "pairs.json").write_text("[]"), ("pairs.json", "not an index")),
        (lambda f: _change_index(f, version=99), ("pairs.json", "format")),
        (lambda f: _change_index(f, shards=[{"file": "x"}]), ("pairs.json", "not an index")),
        (
            lambda f: (f / "shard-00001.safetensors").unlink(),
            ("shard-00001.safetensors is missing", "datagen"),
        ),
        (lambda f: (f / "shard-00000.jsonl").unlink(), ("shard-00000.jsonl is missing", "datagen")),
        (lambda f: _truncate(f / "shard-00002.safetensors"), ("shard-00002.safetensors", "bytes", "datagen")),
        (lambda f: _truncate(f / "shard-00002.jsonl"), ("shard-00002.jsonl", "cannot be read", "datagen")),
        (lambda f: (f / "shard-00002.jsonl").write_text(""), ("shard-00002.jsonl", "0 records", "datagen")),
        (lambda f: _replace(f, hidden_post=torch.ones(1, 5)), ("shard-00002", "hidden_post", "(1, 6)")),
        (lambda f: _replace(f, hidden_pre=torch.full((3, 6), torch.nan)), ("shard-00002", "NaN", "delete")),
        (lambda f: _replace(f, hidden_post=torch.full((1, 6), -torch.inf)), ("shard-00002", "infinity")),
        (lambda f: _replace(f, offsets=torch.tensor([1, 3])), ("shard-00002", "offsets")),
        (lambda f: _replace(f, offsets=torch.tensor([0, 2])), ("shard-00002", "offsets")),
    ],
)
def test_broken_files_are_named(tmp_path: Path, harm: Callable[[Path], Any], words: tuple[str, ...]) -> None:
    _write(tmp_path)
    harm(tmp_path)
    with pytest.raises(InputError) as error:
        list(open_pairs(tmp_path).shards())
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_other_hidden_size_is_refused(tmp_path: Path) -> None:
    _write(tmp_path)
    with pytest.raises(InputError, match=r"pairs\.json.*width 6.*not 128"):
        open_pairs(tmp_path, 128)


def test_index_rejects_missing_or_different_shards(tmp_path: Path) -> None:
    _write(tmp_path)
    with pytest.raises(InputError, match="shard-00003"):
        write_index(tmp_path, 4, model="m", seed=0, settings={})
    write_shard(tmp_path, 3, [], {}, WIDTH, "bfloat16")
    with pytest.raises(InputError, match=r"shard-00003.*another width or dtype"):
        write_index(tmp_path, 4, model="m", seed=0, settings={})
