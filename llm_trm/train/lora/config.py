"""Settings of ``llm-trm train lora``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llm_trm.choices import Halting, Precision, PromptForm, ReasonerKind, Window
from llm_trm.errors import InputError
from llm_trm.ranges import (
    ADAPTER_RANK,
    COUNT,
    DEPTH,
    EPOCHS,
    HELD_OUT,
    LEARNING_RATE,
    LENGTH,
    NO_OR_COUNT,
    NO_OR_DEPTH,
    SHARE_BELOW_ONE,
    TRAINER_SEED,
    WEIGHT,
    WIDTH,
)
from llm_trm.settings import Settings, setting
from llm_trm.shared_settings import trust_remote_code
from llm_trm.train.run import settings as run
from llm_trm.train.run.settings import RunSettings

#: Settings that only one kind of reasoner has.
_OF_ONE_KIND = {"num_latents": "latents", "d_compressed": "sequence", "soft_tokens": "sequence"}


@dataclass(frozen=True)
class ReasonerSettings(Settings):
    """Settings of a :class:`~llm_trm.models.causal.TRMConfig`; None for its default, or that of ``--trm``."""

    reasoner: ReasonerKind | None = setting(
        None,
        "Latents at the model's full width, or one reasoning state at a smaller width.",
        unset="latents; sequence with --trm",
    )
    num_latents: int | None = setting(
        None, "Number of latents M.", LENGTH, unset="256; 8 for models narrower than 512"
    )
    d_compressed: int | None = setting(
        None, "Width D' of a sequence reasoner.", WIDTH, unset="256; a quarter of models up to 256 wide"
    )
    soft_tokens: int | None = setting(None, "Soft tokens K of a sequence reasoner.", DEPTH, unset="1")
    n_layers: int | None = run.layers(None, unset="2")
    n_heads: int | None = run.heads(None)
    n_latent_steps: int | None = run.latent_steps(None, unset="6")
    n_deep_recursions: int | None = run.deep_recursions(None, unset="3")
    supervision_steps: int | None = setting(None, "Maximum number of supervision steps.", DEPTH, unset="8")
    dropout: float | None = setting(
        None, "Dropout of the recursion's attention weights.", SHARE_BELOW_ONE, unset="0"
    )
    halting: Halting | None = setting(
        None,
        "Stop a recursion early: each sample by itself, the batch by its mean, or never.",
        unset="sample",
    )
    halting_loss_weight: float | None = setting(
        None, "Weight of the halting head's loss.", WEIGHT, "--halt-weight", unset="0.1"
    )
    window: Window | None = setting(
        None,
        "always: each recursion drops one of the oldest positions for every position that it adds.",
        unset="slide",
    )

    def given(self) -> dict[str, Any]:
        """The settings that are not None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class LoraTrainingConfig(RunSettings):
    """Settings of :func:`llm_trm.train.lora.train.train_lora`.

    The learning rate of a recursion from phase 2 is a tenth of that of the rest by default, so that what it
    learned lasts until adapters and projection have adjusted to it.

    Raises:
        InputError: A value out of range, or settings that contradict each other.
    """

    COMMAND = "lora"
    FILE = "lora.json"

    data: str = setting(
        ...,
        "Questions and answers: a .jsonl file, a .json file with a list, gsm8k, math, or a dataset on the "
        "hub (owner/name, or owner/name:configuration).",
    )
    output: Path = run.output("runs/lora")
    model: str = setting("arithmetic", "Language model: arithmetic, a folder, or a name on the hub.")
    val_data: str | None = setting(None, "Other questions to validate on.", unset="a part of --data")
    val_fraction: float = setting(0.05, "Fraction of the distinct questions to hold out.", HELD_OUT)
    eval_samples: int = setting(500, "Maximum number of held-out questions per evaluation.", COUNT)
    trm: Path | None = setting(
        None, "Start from the recursion that llm-trm train phase2 wrote to this folder."
    )
    reasoner: ReasonerSettings = field(default_factory=ReasonerSettings)
    lora: bool = setting(True, "Train adapters on the q, k, v and o projections.")
    lora_r: int = setting(16, "Rank of the adapters.", ADAPTER_RANK)
    lora_alpha: int = setting(
        32, "Scale of the adapters: their output is multiplied by this number divided by the rank.", WIDTH
    )
    lora_dropout: float = setting(
        0.1, "Dropout of the adapters' input; 0 saves a sixth of the time on a CPU.", SHARE_BELOW_ONE
    )
    merge: bool = setting(False, "Merge the adapters into the weights at the end.", critical=False)
    prompt_form: PromptForm | None = setting(
        None,
        "plain writes Question: ... Answer: <think> ...; chat applies the chat template.",
        unset="chat if the tokenizer has a template",
    )
    whole_answers: bool = setting(False, "Also learn to write the part of an answer before ####.")
    max_length: int | None = setting(
        None,
        "Maximum number of tokens of a question with its answer; longer ones are left out.",
        LENGTH,
        unset="the model's context",
    )
    curriculum: int = setting(
        0,
        "Number of stages in the first half of training that remove written thinking step by step (Coconut).",
        NO_OR_DEPTH,
    )
    distill: float = setting(
        0.0,
        "Weight of the distance to the hidden states of a pass with written thinking (CODI).",
        WEIGHT,
    )
    epochs: float = setting(3.0, "Number of passes over the data.", EPOCHS)
    steps: int | None = setting(None, "Number of optimizer updates, instead of --epochs.", COUNT)
    batch_size: int = run.batch_size(16)
    accumulation: int = run.accumulation()
    learning_rate: float = setting(
        2e-4, "Peak learning rate: linear warm-up, then linear decay.", LEARNING_RATE
    )
    trm_learning_rate: float | None = setting(
        None,
        "Peak learning rate of the recursion and its compressor.",
        LEARNING_RATE,
        unset="a tenth of --learning-rate with --trm, otherwise the same",
    )
    warmup_ratio: float = run.warmup_ratio()
    weight_decay: float = setting(0.01, "Weight decay of AdamW, on matrices.", WEIGHT)
    clip_norm: float = run.clip_norm()
    precision: Precision = setting(
        "auto",
        "bf16 trains under autocast, with the frozen weights in bfloat16; auto selects it on CUDA, and fp32 "
        "elsewhere.",
    )
    gradient_checkpointing: bool = run.gradient_checkpointing()
    eval_every: int = setting(100, "Updates between evaluations, each with a checkpoint.", COUNT)
    patience: int = setting(
        3,
        "Stop after this many evaluations without a lower loss; 0 for never.",
        NO_OR_COUNT,
        critical=False,
    )
    keep: int = run.keep()
    log_every: int = setting(10, "Updates between logged metrics.", COUNT, critical=False)
    seed: int = setting(0, "Seed of the weights, the held-out part and the data order.", TRAINER_SEED)
    trust_remote_code: bool = trust_remote_code()

    def __post_init__(self) -> None:
        super().__post_init__()
        asked = self.reasoner.given()
        if self.trm is not None and self.reasoner.reasoner == "latents":
            raise InputError("--trm contains a sequence reasoner: leave --reasoner latents out")
        kind = self.reasoner.reasoner or ("latents" if self.trm is None else "sequence")
        for name, wanted in _OF_ONE_KIND.items():
            if name in asked and kind != wanted:
                raise InputError(
                    f"--{name.replace('_', '-')} is for a {wanted} reasoner: leave it out, or choose "
                    f"--reasoner {wanted}"
                )
        if self.whole_answers and (self.curriculum or self.distill):
            raise InputError(
                "--curriculum and --distill need thinking that is separate from the answers: leave "
                "--whole-answers out"
            )

    @property
    def recursion_rate(self) -> float | None:
        """Peak learning rate of the recursion and its compressor; None for that of all parameters."""
        if self.trm_learning_rate is None and self.trm is not None:
            return self.learning_rate / 10
        return self.trm_learning_rate
