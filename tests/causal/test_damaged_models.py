"""Folders of models with a file that is damaged, of the wrong type, or incomplete: one line, exit code 2."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("peft")

from peft import PeftModel

from llm_trm.cli import main
from llm_trm.errors import InputError
from llm_trm.manifest import write_manifest
from llm_trm.models.causal.loading import load_latent_model
from llm_trm.models.loading import load_thinking_model
from tests.causal.lora_world import write_language_model
from tests.causal.saved import latent_model, save
from tests.test_weights import POINTER

DEEP = b"[" * 100_000 + b"]" * 100_000


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain model as one file, as two shards and as a pickle; one with adapters, and one without."""
    root = tmp_path_factory.mktemp("models")
    whole = write_language_model(root / "whole")
    weights = load_file(whole / "model.safetensors")
    for kind in ("shards", "pickle"):
        shutil.copytree(whole, root / kind)
        (root / kind / "model.safetensors").unlink()
    torch.save(weights, root / "pickle" / "pytorch_model.bin")
    place = {
        name: f"model-0000{1 + (number % 2)}-of-00002.safetensors" for number, name in enumerate(weights)
    }
    for file in set(place.values()):
        part = {name: weights[name] for name in weights if place[name] == file}
        save_file(part, root / "shards" / file, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": place}
    (root / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    model = latent_model()
    save(model, root / "adapters")
    save(model, root / "merged", merge=True)
    return root


def copied(saved: Path, kind: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved / kind, tmp_path / kind))


def refusal(folder: Path) -> str:
    """The line with which loading the model of a folder fails."""
    latent = (folder / "latent.json").exists() or folder.name in ("adapters", "merged")
    with pytest.raises(InputError) as refused:
        load_latent_model(folder) if latent else load_thinking_model(str(folder))
    text = str(refused.value)
    assert "\n" not in text and str(folder) in text
    return text


WEIGHT_FILES = {
    "whole": "model.safetensors",
    "shards": "model-00002-of-00002.safetensors",
    "pickle": "pytorch_model.bin",
    "adapters": "adapter_model.safetensors",
    "merged": "model.safetensors",
}


@pytest.mark.parametrize("kind", WEIGHT_FILES)
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda content: b"", "the file is empty"),
        (lambda content: POINTER, "git lfs pull"),
        (lambda content: content[: len(content) // 2], "incomplete"),
        (lambda content: bytes(range(256)) * 8, "cannot be read"),
    ],
    ids=["empty", "pointer", "half", "garbage"],
)
def test_damaged_weights(
    kind: str, damage: Callable[[bytes], bytes], words: str, saved: Path, tmp_path: Path
) -> None:
    path = copied(saved, kind, tmp_path) / WEIGHT_FILES[kind]
    path.write_bytes(damage(path.read_bytes()))
    text = refusal(path.parent)
    assert str(path) in text and words in text


@pytest.mark.parametrize("kind", WEIGHT_FILES)
def test_missing_files_of_weights(kind: str, saved: Path, tmp_path: Path) -> None:
    path = copied(saved, kind, tmp_path) / WEIGHT_FILES[kind]
    path.unlink()
    refusal(path.parent)


def change(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors in a file."""
    pickle = path.suffix == ".bin"
    tensors = torch.load(path) if pickle else load_file(path)
    change(tensors)
    if pickle:
        torch.save(tensors, path)
    else:
        save_file(tensors, path, {"format": "pt"})


def weights_of(path: Path) -> Iterator[str]:
    yield from (torch.load(path) if path.suffix == ".bin" else load_file(path))


@pytest.mark.parametrize("kind", WEIGHT_FILES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_is_not_accepted(kind: str, value: float, saved: Path, tmp_path: Path) -> None:
    path = copied(saved, kind, tmp_path) / WEIGHT_FILES[kind]
    name = max(weights_of(path))
    change(path, lambda tensors: tensors[name].view(-1)[-1].fill_(value))
    text = refusal(path.parent)
    assert "contains NaN or infinity in " in text and name.removeprefix("base_model.model.") in text


@pytest.mark.parametrize("kind", WEIGHT_FILES)
def test_missing_weights_are_not_drawn_at_random(kind: str, saved: Path, tmp_path: Path) -> None:
    path = copied(saved, kind, tmp_path) / WEIGHT_FILES[kind]
    for name in (max(weights_of(path)), next(name for name in weights_of(path) if "q_proj" in name)):
        again = path.read_bytes()
        change(path, lambda tensors, name=name: tensors.pop(name))  # type: ignore[misc]
        text = refusal(path.parent)
        assert name in text or name.replace("lora_A", "lora_A.default") in text
        path.write_bytes(again)


@pytest.mark.parametrize("kind", ["whole", "shards", "pickle", "merged"])
def test_weights_of_other_shapes(kind: str, saved: Path, tmp_path: Path) -> None:
    path = copied(saved, kind, tmp_path) / WEIGHT_FILES[kind]
    name = max(weights_of(path))
    change(path, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    assert "shapes of its weights do not match" in refusal(path.parent)


def test_tied_weights_may_be_missing(saved: Path) -> None:
    for kind in ("whole", "shards", "pickle"):
        assert "lm_head.weight" not in set(weights_of(saved / "whole" / "model.safetensors"))
        load_thinking_model(str(saved / kind))
    for kind in ("adapters", "merged"):
        load_latent_model(saved / kind)


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        *[("whole", file) for file in ("config.json", "generation_config.json", "tokenizer_config.json")],
        ("whole", "tokenizer.json"),
        ("shards", "model.safetensors.index.json"),
        ("adapters", "latent.json"),
        ("adapters", "adapter_config.json"),
        ("merged", "config.json"),
    ],
)
@pytest.mark.parametrize(
    "content", [b"", POINTER, b"[]", b"3", b"null", DEEP, b'{"a": ' + DEEP + b"}", b"\xff{}", b'{"a": 1'],
    ids=["empty", "pointer", "list", "number", "null", "deep", "deep_field", "bytes", "cut"],
)  # fmt: skip
def test_damaged_json(kind: str, file: str, content: bytes, saved: Path, tmp_path: Path) -> None:
    path = copied(saved, kind, tmp_path) / file
    path.write_bytes(content)
    text = refusal(path.parent)
    if file != "tokenizer.json":
        assert str(path) in text


@pytest.mark.parametrize(
    ("kind", "file", "field", "value"),
    [
        *[("whole", "config.json", "use_cache", value) for value in (3, "yes", [1])],
        *[("whole", "config.json", "pad_token_id", value) for value in (10**30, "a", 1.5, {"a": 1}, -7)],
        *[("whole", "config.json", "hidden_size", value) for value in ({"a": 1}, "a")],
        *[("whole", "generation_config.json", "eos_token_id", value) for value in ("a", [1, "a"], 1e99)],
        *[("whole", "generation_config.json", "max_length", value) for value in ("a", -1, [1])],
        *[("whole", "generation_config.json", "temperature", value) for value in (float("nan"), "a", -1)],
        *[("whole", "generation_config.json", "output_attentions", value) for value in ("a", 1)],
        *[("whole", "tokenizer_config.json", "model_max_length", value) for value in ("a", [1], {"a": 1})],
        ("whole", "tokenizer_config.json", "fast_tokenizer_files", 3),
        *[("adapters", "latent.json", name, 3) for name in ("base", "settings", "facts")],
        ("adapters", "adapter_config.json", "task_type", None),
        *[("adapters", "adapter_config.json", "alora_invocation_tokens", value) for value in (3, ["a"])],
    ],
)
def test_fields(kind: str, file: str, field: str, value: Any, saved: Path, tmp_path: Path) -> None:
    path = copied(saved, kind, tmp_path) / file
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    text = refusal(path.parent)
    assert field in text and file in text


@pytest.mark.parametrize(
    ("field", "value"),
    [("peft_type", "NONSENSE"), ("peft_type", 3), ("target_modules", 3), ("use_dora", True)],
)
def test_adapters_that_peft_rejects(field: str, value: Any, saved: Path, tmp_path: Path) -> None:
    path = copied(saved, "adapters", tmp_path) / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    refusal(path.parent)


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_memory_that_runs_out_is_no_fault_of_the_adapters(
    error: type[Exception], saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(PeftModel, "from_pretrained", full)
    with pytest.raises(error):
        load_latent_model(saved / "adapters")


def test_a_missing_adapter_config(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, "adapters", tmp_path)
    (folder / "adapter_config.json").unlink()
    assert "config.json" in refusal(folder)


def test_a_tokenizer_without_an_end(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, "whole", tmp_path)
    (folder / "tokenizer_config.json").unlink()
    common = ["--model", str(folder), "--device", "cpu", "--max-new-tokens", "2"]
    for words in (["generate", "1+1"], ["datagen", "--num-samples", "1", "-o", str(tmp_path / "pairs")]):
        result = CliRunner().invoke(main, [*words, *common])
        assert result.exit_code == 2 and "neither a padding nor an end token" in result.stderr


@pytest.mark.parametrize("kind", ["whole", "adapters"])
def test_the_only_line_on_stderr(kind: str, saved: Path, tmp_path: Path) -> None:
    """Neither transformers' table of weights nor a warning of peft precedes the error."""
    path = copied(saved, kind, tmp_path) / WEIGHT_FILES[kind]
    change(path, lambda tensors: tensors.pop(max(tensors)))
    option = "--model" if kind == "whole" else "--checkpoint"
    result = CliRunner().invoke(main, ["generate", option, str(path.parent), "--device", "cpu", "1+1"])
    assert result.exit_code == 2
    assert result.stderr.startswith("llm-trm: error: ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize("kind", ["whole", "adapters", "merged"])
def test_a_checkpoint_that_has_changed_is_refused(saved: Path, kind: str, tmp_path: Path) -> None:
    folder = copied(saved, kind, tmp_path)
    write_manifest(folder)
    path = folder / WEIGHT_FILES[kind]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # the lowest bit of the last weight: a valid file of finite weights
    path.write_bytes(content)
    assert f"{path} has changed since it was written" in refusal(folder)


def test_reports_of_transformers(saved: Path, tmp_path: Path) -> None:
    """An error replaces the table of missing weights; that of unexpected ones is still printed."""
    records: list[str] = []

    class Record(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record.getMessage())

    handler, logger = Record(), logging.getLogger("transformers")
    path = copied(saved, "whole", tmp_path) / "model.safetensors"
    logger.addHandler(handler)
    try:
        change(path, lambda tensors: tensors.update(other=torch.zeros(1)))
        load_thinking_model(str(path.parent))
        assert "UNEXPECTED" in "".join(records)
        records.clear()
        change(path, lambda tensors: tensors.pop("model.norm.weight"))
        refusal(path.parent)
        assert not records
    finally:
        logger.removeHandler(handler)
