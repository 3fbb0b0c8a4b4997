"""Settings of ``llm-trm train lm``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llm_trm.data.arithmetic import World
from llm_trm.ranges import COUNT, LEARNING_RATE, SHARE, TRAINER_SEED
from llm_trm.settings import setting
from llm_trm.train.run import settings as run
from llm_trm.train.run.settings import RunSettings


@dataclass(frozen=True)
class LanguageModelConfig(RunSettings):
    """Settings of :func:`~llm_trm.train.lm.train.train_language_model`.

    Raises:
        InputError: A value out of range, or both ``resume`` and ``overwrite``.
    """

    COMMAND = "lm"
    FILE = "lm.json"

    output: Path = run.output("runs/lm", "Folder for the model, in Hugging Face format, and its checkpoints.")
    preset: Literal["tiny"] = setting("tiny", "Size of the model.")
    world: World = field(default_factory=World)
    thinking_share: float = setting(
        0.6, "Fraction of the samples with a worked trace; the others teach to answer at once.", SHARE
    )
    steps: int = setting(1200, "Number of optimizer updates.", COUNT)
    batch_size: int = run.batch_size(128)
    learning_rate: float = setting(
        2e-3,
        "Peak learning rate: linear warm-up over 5% of the steps, then cosine decay to 0.",
        LEARNING_RATE,
    )
    eval_samples: int = setting(
        400, "Number of held-out problems for the accuracy at the end.", COUNT, critical=False
    )
    log_every: int = setting(25, "Steps between logged metrics.", COUNT, critical=False)
    save_every: int = setting(200, "Steps between checkpoints.", COUNT, critical=False)
    seed: int = setting(0, "Seed of the weights and the samples.", TRAINER_SEED)
