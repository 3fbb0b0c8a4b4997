"""Settings of ``llm-trm train lora``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from llm_trm.data.lessons import PromptForm
from llm_trm.errors import InputError
from llm_trm.ranges import (
    ADAPTER_RANK,
    BATCH,
    CLIP_NORM,
    COUNT,
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
    require_ranges,
)
from llm_trm.train.run.config import as_json
from llm_trm.train.run.tracking import Track

Precision = Literal["auto", "bf16", "fp32"]

#: What may change when a run is resumed.
_FREE = {
    *("output", "resume", "overwrite", "device", "track", "patience", "keep", "log_every", "merge"),
    *("gradient_checkpointing", "trust_remote_code"),
}
#: Settings that one kind of reasoner has.
_OF_ONE_KIND = {"num_latents": "latents", "d_compressed": "sequence", "soft_tokens": "sequence"}


@dataclass(frozen=True)
class LoraTrainingConfig:
    """Settings of :func:`llm_trm.train.lora.train.train_lora`.

    Attributes:
        data: What to learn from; see :func:`~llm_trm.data.questions.load_solved`.
        output: Folder of the finished model and of the checkpoints on the way.
        model: The language model: ``"arithmetic"``, a folder, or a name on the hub.
        val_data: What is held out; None for a part of ``data``.
        val_fraction: Share of the different questions that is held out.
        eval_samples: Held-out questions at most.
        prompt_form: How questions are put; by default as a chat where the tokenizer has a template for it.
        whole_answers: Learn to write what stands before ``####`` in an answer.
        max_length: Tokens of a question and its answer at most; longer ones are left out. By default as many
            as the language model's context holds.
        trm: A run of phase 2 to start from.
        reasoner: Settings of a :class:`~llm_trm.models.causal.TRMConfig` that were asked for.
        lora: Whether the decoder gets adapters; otherwise it stays as it is.
        lora_r, lora_alpha, lora_dropout: Of the adapters.
        merge: Fold the adapters into the weights at the end, and write all of them.
        curriculum: Stages in which written thinking is taken away; 0 for none of it from the beginning.
        distill: Weight of the distance from the hidden states of the run with written thinking.
        epochs: Passes over the data.
        steps: Updates, instead of ``epochs``.
        batch_size: Samples a batch, of one process.
        accumulation: Batches an update.
        learning_rate: Peak of warm-up and linear decay.
        trm_learning_rate: That of the recursion and its compressor; by default a tenth of ``learning_rate``
            for those of phase 2, so that they last until adapters and projection know them, and the same for
            new ones.
        warmup_ratio: Share of the updates with a rising rate.
        weight_decay: Of AdamW, on matrices.
        clip_norm: Largest gradient norm.
        precision: ``"bf16"`` is autocast, with the frozen decoder in bfloat16; ``"auto"`` takes it on CUDA.
        gradient_checkpointing: Compute the decoder's activations again in the backward pass.
        eval_every: Updates between evaluations on what is held out, each with a checkpoint.
        patience: Evaluations without a lower loss before the run stops; 0 for never.
        keep: Best checkpoints to keep, besides the last.
        log_every: Updates between two logged metrics.
        seed: Of weights, held-out part, order and dropout.
        resume: Go on from the last checkpoint in ``output``.
        overwrite: Replace a run in ``output``.
        track: Where metrics go.
        device: ``"cpu"``, ``"cuda"`` or ``"mps"``.
        trust_remote_code: Run the Python files that the language model brings, if it needs them.

    Raises:
        InputError: Settings that contradict each other.
    """

    data: str
    output: Path
    model: str = "arithmetic"
    val_data: str | None = None
    val_fraction: Annotated[float, HELD_OUT] = 0.05
    eval_samples: Annotated[int, COUNT] = 500
    prompt_form: PromptForm | None = None
    whole_answers: bool = False
    max_length: Annotated[int, LENGTH] | None = None
    trm: Path | None = None
    reasoner: dict[str, Any] = field(default_factory=dict)
    lora: bool = True
    lora_r: Annotated[int, ADAPTER_RANK] = 16
    lora_alpha: Annotated[int, WIDTH] = 32
    lora_dropout: Annotated[float, SHARE_BELOW_ONE] = 0.1
    merge: bool = False
    curriculum: Annotated[int, NO_OR_DEPTH] = 0
    distill: Annotated[float, WEIGHT] = 0.0
    epochs: Annotated[float, EPOCHS] = 3.0
    steps: Annotated[int, COUNT] | None = None
    batch_size: Annotated[int, BATCH] = 16
    accumulation: Annotated[int, BATCH] = 1
    learning_rate: Annotated[float, LEARNING_RATE] = 2e-4
    trm_learning_rate: Annotated[float, LEARNING_RATE] | None = None
    warmup_ratio: Annotated[float, SHARE_BELOW_ONE] = 0.1
    weight_decay: Annotated[float, WEIGHT] = 0.01
    clip_norm: Annotated[float, CLIP_NORM] = 1.0
    precision: Precision = "auto"
    gradient_checkpointing: bool = False
    eval_every: Annotated[int, COUNT] = 100
    patience: Annotated[int, NO_OR_COUNT] = 3
    keep: Annotated[int, COUNT] = 3
    log_every: Annotated[int, COUNT] = 10
    seed: Annotated[int, TRAINER_SEED] = 0
    resume: bool = False
    overwrite: bool = False
    track: Track | None = None
    device: str = "cpu"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        require_ranges(self, InputError)
        if self.resume and self.overwrite:
            raise InputError("--resume goes on with a run and --overwrite replaces it: choose one")
        if self.trm is not None and self.reasoner.get("reasoner", "sequence") != "sequence":
            raise InputError("--trm holds a sequence reasoner: leave --reasoner latents out")
        kind = self.reasoner.get("reasoner", "latents" if self.trm is None else "sequence")
        for name, wanted in _OF_ONE_KIND.items():
            if name in self.reasoner and kind != wanted:
                raise InputError(
                    f"--{name.replace('_', '-')} is of a {wanted} reasoner: leave it out, or choose "
                    f"--reasoner {wanted}"
                )
        if self.whole_answers and (self.curriculum or self.distill):
            raise InputError(
                "--curriculum and --distill need the thinking apart from answers: leave --whole-answers out"
            )

    @property
    def recursion_rate(self) -> float | None:
        """Peak of the learning rate of the recursion and its compressor; None for that of all."""
        if self.trm_learning_rate is None and self.trm is not None:
            return self.learning_rate / 10
        return self.trm_learning_rate

    @property
    def bf16(self) -> bool:
        """Whether to compute in bfloat16."""
        return self.precision == "bf16" or (self.precision == "auto" and self.device == "cuda")

    def record(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return as_json(self)

    def require_same(self, record: dict[str, Any]) -> None:
        """Raise InputError unless a run with the settings ``record`` may be resumed with these."""
        for name, value in self.record().items():
            if name not in _FREE and record.get(name) != value:
                raise InputError(
                    f"{self.output} was trained with {name} {record.get(name)!r}, not {value!r}: resume with "
                    "the same settings, or choose another folder"
                )
