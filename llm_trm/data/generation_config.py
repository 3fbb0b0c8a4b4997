"""Settings of ``llm-trm datagen``. Imports no torch, so that help is quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llm_trm.choices import DeviceName
from llm_trm.data.arithmetic import Split, World
from llm_trm.ranges import BATCH, COUNT, LENGTH, NO_OR_LENGTH, NO_OR_SPREAD, SEED
from llm_trm.settings import Settings, setting
from llm_trm.shared_settings import device, top_p, trust_remote_code


@dataclass(frozen=True)
class Limits(Settings):
    """How long a sample may get, in tokens.

    Raises:
        InputError: A value out of range.
    """

    prompt: int = setting(
        2048,
        "Maximum number of tokens per prompt; a problem with a longer one yields no pair.",
        LENGTH,
        "--max-prompt-tokens",
    )
    thinking: int = setting(
        1024,
        "Maximum number of tokens up to </think>, including both tags; a problem that needs more yields no "
        "pair.",
        LENGTH,
        "--max-new-tokens",
    )
    answer: int = setting(
        32,
        "Maximum number of tokens per answer, which is recorded and graded; 0 leaves it out.",
        NO_OR_LENGTH,
        "--answer-tokens",
    )


@dataclass(frozen=True)
class Sampling(Settings):
    """How tokens are drawn.

    Raises:
        InputError: A value out of range.
    """

    temperature: float = setting(
        0.7,
        "Sampling temperature of the thinking; 0 always takes the most likely token, as the answer does.",
        NO_OR_SPREAD,
    )
    top_p: float = top_p()
    seed: int = setting(0, "Seed for sampling and for arithmetic problems.", SEED)


@dataclass(frozen=True)
class DataGenConfig(Settings):
    """Settings of a :class:`~llm_trm.data.generation.ThinkingDataGenerator`.

    Raises:
        InputError: A value out of range.
    """

    model: str = setting(
        "arithmetic",
        "Model that thinks: a folder in Hugging Face format, a name on the hub, or arithmetic, the bundled "
        "model.",
    )
    data: str = setting(
        "arithmetic",
        "Problems: arithmetic, gsm8k, math, aime, humaneval, mbpp, apps, or a .jsonl or .json file with the "
        "columns question (or problem, prompt, text) and, optionally, answer (or solution). Separate several "
        "by commas for equal shares.",
        was=("--dataset",),
    )
    num_samples: int = setting(1000, "Number of problems to think about.", COUNT)
    split: Split = setting("train", "Split of the data set; a data set with a single split ignores this.")
    world: World = field(default_factory=World)
    batch_size: int = setting(
        32, "Problems per batch on each device; halved if memory runs out.", BATCH, critical=False
    )
    limits: Limits = field(default_factory=Limits)
    sampling: Sampling = field(default_factory=Sampling)
    output: Path = setting(
        Path("data/pairs"),
        "Folder for the pairs. An incomplete folder is completed.",
        None,
        "-o",
        "--output",
        critical=False,
    )
    shard_size: int = setting(
        512,
        "Problems per file. A process generates one file at a time, which is all that an interruption loses.",
        COUNT,
    )
    dtype: Literal["bf16", "fp32"] | None = setting(
        None, "Precision of the stored states.", unset="the model's: bf16 on CUDA, and fp32 elsewhere"
    )
    overwrite: bool = setting(False, "Replace the pairs in --output.", action=True, was=("--fresh",))
    trust_remote_code: bool = trust_remote_code()
    device: DeviceName = device()
