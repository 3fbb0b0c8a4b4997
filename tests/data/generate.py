"""A small run of the generator, in a process that can be killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llm_trm.data.generation import GenerationProgress, ThinkingDataGenerator
from llm_trm.data.generation_config import DataGenConfig, Limits, Sampling
from llm_trm.data.pairs import PairFiles


def generate(output: Path, model: Path, **changes: Any) -> PairFiles:
    """Generate 24 problems in shards of 3."""
    settings: dict[str, Any] = {
        "num_samples": 24,
        "shard_size": 3,
        "batch_size": 4,
        "sampling": Sampling(0.7, seed=1),
        "limits": Limits(100, 30, 4),
        "device": "cpu",
    }
    torch.set_num_threads(1)
    on_progress = changes.pop("on_progress", lambda _: None)
    config = DataGenConfig(output=output, model=str(model), **(settings | changes))
    return ThinkingDataGenerator(config, on_progress=on_progress).run()


def generate_counting(output: Path, model: Path, settled: Any) -> None:
    """Run, and store the number of finished problems in ``settled``, a shared integer."""

    def count(progress: GenerationProgress) -> None:
        settled.value = progress.done - progress.resumed

    generate(output, model, on_progress=count)
