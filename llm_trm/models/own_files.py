"""Checks the files of a model in Hugging Face format before transformers opens them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm_trm.errors import InputError
from llm_trm.files import named_in, read_object
from llm_trm.ranges import FINITE, require_in
from llm_trm.weights import RESTORE, read_shapes, read_torch, require_no_pointer, require_present

_CONFIG, _TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"
#: Files that contain a JSON object, which transformers assumes.
_OBJECTS = (
    _CONFIG,
    "generation_config.json",
    _TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
)
#: Weights and indices of weights, of which transformers loads the first that exists.
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_REMEDY = "load a model whose files are all in its own folder"


def require_own_files(folder: Path) -> None:
    """Check the JSON files of a model, and the file names in them, which transformers follows to any path.

    Raises:
        InputError: A file is invalid, or names a file outside the folder.
    """
    objects = {name: _object(folder / name) for name in _OBJECTS}
    named: list[tuple[Path, Any]] = []
    for path in sorted(folder.glob("*.index.json")):
        named += [(path, name) for name in _indexed(path)]
    if (name := objects[_CONFIG].get("transformers_weights")) is not None:
        named.append((folder / _CONFIG, name))
    if (length := objects[_TOKENIZER_CONFIG].get("model_max_length")) is not None:
        where = f"{folder / _TOKENIZER_CONFIG}: "
        require_in(FINITE, "model_max_length", length, InputError, where)
    tokenizers = objects[_TOKENIZER_CONFIG].get("fast_tokenizer_files") or ()
    if not isinstance(tokenizers, (list, tuple)):
        raise InputError(f"{folder / _TOKENIZER_CONFIG}: fast_tokenizer_files is not a list: {_REMEDY}")
    named += [(folder / _TOKENIZER_CONFIG, name) for name in tokenizers]
    for path, name in named:
        named_in(folder, name, path, _REMEDY)


def require_weights(folder: Path) -> None:
    """Open the files of weights that transformers would load, without reading the tensors.

    Raises:
        InputError: A file is missing, incomplete, a Git LFS pointer, or does not contain tensors.
    """
    for path in _weight_files(folder):
        if path.suffix == ".safetensors":
            read_shapes(path, RESTORE)
        else:
            read_torch(path, RESTORE, mapped=True)


def require_no_pointers(folder: Path) -> None:
    """Raise InputError if a file in ``folder`` is a Git LFS pointer, which explains most other errors."""
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        require_no_pointer(path)


def _weight_files(folder: Path) -> list[Path]:
    name = _object(folder / _CONFIG).get("transformers_weights")
    names = _WEIGHTS if name is None else (name,)
    path = next((folder / name for name in names if (folder / name).exists()), None)
    if path is None:
        return []  # loading the model reports it
    return [folder / name for name in _indexed(path)] if path.name.endswith(".index.json") else [path]


def _indexed(path: Path) -> list[str]:
    weights = _object(path).get("weight_map")
    if not isinstance(weights, dict):
        raise InputError(f"{path} is not an index of weights: {_REMEDY}")
    return list(dict.fromkeys(map(str, weights.values())))


def _object(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    require_present(path, RESTORE)
    return read_object(path, RESTORE)
