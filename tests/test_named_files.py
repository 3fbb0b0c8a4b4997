"""An index may only name files below its folder; symbolic links may point anywhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from llm_trm.cli import main
from llm_trm.data.pairs import Pair, open_pairs, write_index, write_shard
from llm_trm.errors import InputError
from llm_trm.files import named_in, write_json
from llm_trm.models.loading import load_thinking_model
from llm_trm.models.own_files import require_own_files
from llm_trm.models.run_folder import best_checkpoint
from llm_trm.train.lora.callbacks import KeepBest
from llm_trm.train.run.checkpoints import Checkpoints, newest_whole
from llm_trm.train.run.trainer_checkpoints import complete_checkpoints, require_resumable

OUTSIDE = ("../x", "a/../../x", "/etc/passwd", "..", "", ".", "..\\x", "C:\\x", "C:x", "a\0", None, 3, ["a"])


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_out(name: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"index\.json names .* not a file below .*: do this") as refused:
        named_in(tmp_path, name, tmp_path / "index.json", "do this")
    assert "\n" not in str(refused.value)


def test_names_that_stay(tmp_path: Path) -> None:
    for name in ("a", "a/b", "..a", "a..b", "shard-00001.safetensors"):
        assert named_in(tmp_path, name, tmp_path / "index.json", "") == tmp_path / name


def write_pairs(folder: Path) -> Path:
    folder.mkdir()
    record = {"problem": "1+1", "answer": "2", "thinking": "", "response": "2", "correct": True}
    numbers = {"index": 0, "context_length": 2, "thinking_tokens": 0, "next_token": 1}
    pair = Pair(torch.zeros(2, 4), torch.zeros(4), record | numbers)
    write_shard(folder, 0, [pair], {}, 4, "float32")
    write_index(folder, 1, model="m", seed=0, settings={})
    return folder


@pytest.mark.parametrize("entry", ["file", "metadata"])
def test_shards_of_pairs(entry: str, tmp_path: Path) -> None:
    write_pairs(tmp_path / "other")
    index = write_pairs(tmp_path / "pairs") / "pairs.json"
    content = json.loads(index.read_text())
    for parent in ("../other", str(tmp_path / "other")):
        shard = content["shards"][0]
        named = {**shard, entry: f"{parent}/{Path(shard[entry]).name}"}
        index.write_text(json.dumps({**content, "shards": [named]}))
        with pytest.raises(InputError, match=r"pairs\.json names .*other"):
            open_pairs(index.parent)


def test_linked_shards_are_read(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "pairs")
    for path in folder.glob("shard-*"):
        path.rename(tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    assert [record["problem"] for record in open_pairs(folder).records()] == ["1+1"]


@pytest.mark.parametrize("entry", ["last", "best", "kept"])
@pytest.mark.parametrize("name", ["../../secret", "/secret", "a/b", "./c0"])
def test_checkpoints(entry: str, name: str, tmp_path: Path) -> None:
    run = Checkpoints(tmp_path)
    with run.new("c0", 1.0) as folder:
        (folder / "content").touch()
    path = tmp_path / "index.json"
    index = json.loads(path.read_text())
    index[entry] = [{"name": name, "validation_loss": 1.0}] if entry == "kept" else name
    write_json(path, index)
    for use in (lambda: run.last, lambda: run.best, lambda: run.go_on_from(tmp_path / "checkpoints" / "c0")):
        with pytest.raises(InputError, match=r"index\.json"):
            use()
    assert (tmp_path / "checkpoints" / "c0" / "content").exists()
    if entry == "best" and name.startswith(("..", "/")):
        with pytest.raises(InputError, match="names"):
            best_checkpoint(tmp_path, "name another folder")


def shard(folder: Path, outside: Path) -> Path:
    """Put the arithmetic model into ``folder`` and its weights ``outside``; return their index."""
    shutil.copytree(load_thinking_model("arithmetic").model.name_or_path, folder)
    outside.mkdir()
    weights = load_file(folder / "model.safetensors")
    save_file(weights, outside / "part.safetensors", {"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, "part.safetensors")}
    write_json(folder / "model.safetensors.index.json", index)
    return folder / "model.safetensors.index.json"


def test_weights_of_a_model(tmp_path: Path) -> None:
    index = shard(tmp_path / "lm", tmp_path / "outside")
    content = json.loads(index.read_text())
    (index.parent / "part.safetensors").symlink_to(tmp_path / "outside" / "part.safetensors")
    assert load_thinking_model(str(index.parent)).hidden_size == 128
    for parent in ("../outside", str(tmp_path / "outside")):
        names = dict.fromkeys(content["weight_map"], f"{parent}/part.safetensors")
        write_json(index, {**content, "weight_map": names})
        words = ["generate", "--model", str(index.parent), "--device", "cpu", "1+1"]
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
        assert "model.safetensors.index.json names" in result.stderr
    # As for a checkpoint from which a run resumes.
    (index.parent / "trainer_state.json").touch()
    index.parent.rename(tmp_path / "checkpoint-1")
    with pytest.raises(InputError, match="names"):
        newest_whole(complete_checkpoints(tmp_path), require_resumable)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", {"transformers_weights": "../x.safetensors"}),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["tokenizer.json", "../tokenizer.5.0.json"]}),
        ("model.safetensors.index.json", {"weight_map": {"w": "/x"}}),
        ("model.safetensors.index.json", {"weight_map": []}),
        ("pytorch_model.bin.index.json", {"weight_map": {"w": "../x"}}),
        ("config.json", []),
    ],
)
def test_other_names_in_a_model_folder(file: str, content: Any, tmp_path: Path) -> None:
    write_json(tmp_path / file, content)
    with pytest.raises(InputError, match=file):
        require_own_files(tmp_path)


def test_best_checkpoint_of_a_run_is_its_own(tmp_path: Path) -> None:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    (tmp_path / "elsewhere" / "checkpoint-2").mkdir(parents=True)
    arguments = TrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True)
    state = TrainerState(
        best_global_step=2, best_model_checkpoint=str(tmp_path / "elsewhere" / "checkpoint-2")
    )
    KeepBest(1, 0, 0.0).on_train_begin(arguments, state, TrainerControl())
    assert state.best_model_checkpoint is None
    # The run was moved: the path in its state is the old one.
    (tmp_path / "run" / "checkpoint-2").mkdir(parents=True)
    KeepBest(1, 0, 0.0).on_train_begin(arguments, state, TrainerControl())
    assert state.best_model_checkpoint == str(tmp_path / "run" / "checkpoint-2")
