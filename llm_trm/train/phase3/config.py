"""Settings of phase 3."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llm_trm.data.arithmetic import World
from llm_trm.ranges import (
    BATCH,
    COUNT,
    GROUP,
    LEARNING_RATE,
    LENGTH,
    SPREAD,
    TRAINER_SEED,
    WEIGHT,
)
from llm_trm.settings import setting
from llm_trm.shared_settings import trust_remote_code
from llm_trm.train.run import settings as run
from llm_trm.train.run.settings import RunSettings


@dataclass(frozen=True)
class Phase3Config(RunSettings):
    """Settings of :func:`~llm_trm.train.phase3.train.train_phase3`.

    At a learning rate of 1e-4, models that answered nearly all questions lost up to 3% of the answers in 25
    steps, and others gained less (docs/phase3.md).

    Raises:
        InputError: A value out of range, or both ``resume`` and ``overwrite``.
    """

    COMMAND = "phase3"
    FILE = "phase3.json"

    checkpoint: str = setting(
        "runs/lora",
        "Language model with a recursion: a folder from llm-trm train lora, or a name on the hub.",
    )
    output: Path = run.output("runs/phase3")
    data: str = setting(
        "arithmetic",
        "Problems: arithmetic, gsm8k, math, or a .jsonl or .json file with the columns question and answer. "
        "The test split is held out, or the first problems if there is none.",
        was=("--dataset",),
    )
    world: World = field(default_factory=World)
    think: Literal["prompt", "model"] = setting(
        "prompt",
        "Whether every prompt ends in <think>, or the model has to write it. Text before <think> cannot be "
        "trained, since no recursion precedes it.",
    )
    group_size: int = setting(8, "Completions per problem, whose rewards are compared.", GROUP)
    batch_size: int = setting(64, "Completions per process at a time: a multiple of --group-size.", BATCH)
    accumulation: int = run.accumulation("--gradient-accumulation")
    kl: float = setting(0.1, "Weight of the KL divergence from the initial model; 0 leaves it out.", WEIGHT)
    format_weight: float = setting(
        0.2, "Weight of the reward for the format; that of a right answer is 1.", WEIGHT
    )
    steps: int = setting(200, "Number of optimizer updates.", COUNT)
    learning_rate: float = setting(
        3e-5, "Peak learning rate: linear warm-up over 5% of the steps, then linear decay.", LEARNING_RATE
    )
    temperature: float = setting(1.0, "Sampling temperature in training.", SPREAD)
    max_new_tokens: int = setting(32, "Maximum number of tokens per completion.", LENGTH)
    clip_norm: float = run.clip_norm()
    gradient_checkpointing: bool = run.gradient_checkpointing()
    eval_samples: int = setting(200, "Number of held-out problems.", COUNT)
    eval_every: int = setting(
        25,
        "Steps between evaluations of greedy answers; two more run at the start and at the end.",
        COUNT,
        critical=False,
    )
    log_every: int = setting(5, "Steps between logged metrics and completions.", COUNT, critical=False)
    save_every: int = setting(
        50, "Steps between checkpoints, of which the last three are kept.", COUNT, critical=False
    )
    seed: int = setting(0, "Seed of the problems, their order and the completions.", TRAINER_SEED)
    trust_remote_code: bool = trust_remote_code()
