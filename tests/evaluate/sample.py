"""Writes tiny folders of random pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llm_trm.data.pairs import Pair, PairFiles, write_index, write_shard

D, D_COMPRESSED, VOCABULARY = 12, 4, 9
SETTINGS: dict[str, Any] = {"dataset": "arithmetic", "split": "test"}


def write_pairs(
    folder: Path,
    *,
    samples: int,
    seed: int = 0,
    width: int = D,
    vocabulary: int = VOCABULARY,
    model: str = "arithmetic",
    shard: int = 8,
) -> PairFiles:
    """Write ``samples`` random pairs with contexts of 1 to 9 states and 1 to 3 operations."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int) -> int:
        return int(torch.randint(1, high + 1, (), generator=generator))

    def pair(index: int) -> Pair:
        length, operations = draw(9), 1 + index % 3
        problem = str(draw(9)) + "".join(f"+{draw(99)}" for _ in range(operations))
        record = {
            "index": index,
            "problem": problem,
            "answer": "1",
            "thinking": "",
            "context_length": length,
            "thinking_tokens": draw(40),
            "next_token": draw(vocabulary) - 1,
            "response": "1",
            "correct": True,
        }
        states = torch.randn(length, width, generator=generator)
        return Pair(states, torch.randn(width, generator=generator), record)

    folder.mkdir(parents=True)
    pairs = [pair(index) for index in range(samples)]
    shards = [pairs[begin : begin + shard] for begin in range(0, max(samples, 1), shard)]
    for number, members in enumerate(shards):
        write_shard(folder, number, members, {}, width, "float32")
    return write_index(folder, len(shards), model=model, seed=seed, settings=SETTINGS | {"seed": seed})
