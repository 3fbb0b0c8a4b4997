"""A toy of phase 2: contexts whose mean the recursion is to find, in tiny pair files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from llm_trm.data.pairs import RECORD, Pair, write_index, write_shard
from llm_trm.models.compression import DimensionCompressor, save_compressor
from llm_trm.train.phase2.trainer import Phase2Config
from llm_trm.weights import read_tensors

WIDTH, COMPRESSED = 16, 8


def write_pairs(folder: Path, count: int = 40, width: int = WIDTH, shards: int = 2, seed: int = 0) -> Path:
    """``count`` contexts of 3 to 9 states, each leading to the direction of their mean."""
    chance = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    pairs = []
    for index in range(count):
        states = torch.randn(3 + index % 7, width, generator=chance)
        target = states.mean(dim=0)
        record: dict[str, Any] = dict.fromkeys(RECORD) | {"index": index, "problem": f"{index} of {seed}"}
        pairs.append(Pair(states, target / target.norm() * width**0.5, record))
    for number in range(shards):
        write_shard(folder, number, pairs[number::shards], {}, width, "float32")
    write_index(folder, shards, model="toy", seed=seed, settings={})
    return folder


def write_compressor(folder: Path, width: int = WIDTH, compressed: int = COMPRESSED) -> Path:
    torch.manual_seed(7)
    save_compressor(DimensionCompressor(width, compressed), folder, model="toy")
    return folder


def write_toy(folder: Path) -> Path:
    """Pairs and compressor where :func:`toy_config` looks for them."""
    write_pairs(folder / "pairs")
    write_compressor(folder / "compressor")
    return folder


def toy_config(folder: Path, **options: Any) -> Phase2Config:
    """Settings of a run in ``folder / "run"`` on the pairs in ``folder / "pairs"``."""
    settings = {
        "n_layers": 1,
        "n_latent_steps": 1,
        "n_deep_recursions": 2,
        "supervision_steps": 2,
        "batch_size": 8,
        "epochs": 2,
        "learning_rate": 1e-2,
        "ema_decay": 0.9,
        "val_fraction": 0.2,
        "log_every": 1,
        "device": "cpu",
    }
    paths = {"data": "pairs", "compressor": "compressor", "output": "run"}
    return Phase2Config(**{name: folder / path for name, path in paths.items()} | settings | options)


def content_of(output: Path) -> dict[str, Any]:
    """All that a run leaves: checkpoints, index and, where there are, logged metrics."""
    files = sorted(path for path in (output / "checkpoints").rglob("*") if path.is_file())
    found: dict[str, Any] = {}
    for path in files:
        name = str(path.relative_to(output))
        if path.suffix == ".safetensors":
            found[name] = {key: tensor.tolist() for key, tensor in read_tensors(path, "").items()}
        else:
            found[name] = json.loads(path.read_text())
    found["index"] = json.loads((output / "index.json").read_text())
    metrics = output / "metrics.jsonl"
    found["metrics"] = metrics.read_text() if metrics.exists() else None
    return found
