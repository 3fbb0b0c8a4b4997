"""Settings of phase 2."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llm_trm.choices import Halting, HaltLoss, Precision
from llm_trm.errors import InputError
from llm_trm.ranges import (
    COSINE,
    COUNT,
    DEPTH,
    HELD_OUT,
    LEARNING_RATE,
    SEED,
    SHARE_BELOW_ONE,
    WEIGHT,
)
from llm_trm.settings import setting
from llm_trm.train.run import settings as run
from llm_trm.train.run.settings import RunSettings


@dataclass(frozen=True)
class Phase2Config(RunSettings):
    """Settings of a :class:`~llm_trm.train.phase2.trainer.TRMSequenceTrainer`.

    Defaults are those of the paper and of anonx3247/llm-trm, except dropout, which is 0.1 there.

    Raises:
        InputError: A value out of range, or settings that contradict each other.
    """

    COMMAND = "phase2"

    data: Path = setting(Path("data/pairs"), "Folder of pairs from llm-trm datagen.", critical=False)
    compressor: Path = setting(
        Path("runs/phase1"), "Folder of a compressor from llm-trm train phase1.", critical=False
    )
    output: Path = run.output("runs/phase2")
    val_data: Path | None = setting(
        None, "Folder of other pairs to validate on.", unset="a part of --data", critical=False
    )
    val_fraction: float = setting(0.05, "Fraction of the pairs to hold out.", HELD_OUT)
    n_layers: int = run.layers(2)
    n_heads: int | None = run.heads(None)
    n_latent_steps: int = run.latent_steps(6)
    n_deep_recursions: int = run.deep_recursions(3)
    dropout: float = setting(0.0, "Dropout of attention weights; the original uses 0.1.", SHARE_BELOW_ONE)
    supervision_steps: int = setting(8, "Supervision steps per batch, and maximum at inference.", DEPTH)
    steps_per_update: int = setting(
        1, "Supervision steps per optimizer update: a divisor of --supervision-steps.", DEPTH
    )
    halt_loss: HaltLoss = setting(
        "mse",
        "The halting head learns the cosine similarity (mse), or whether it is above a threshold (bce).",
    )
    halt_weight: float = setting(0.5, "Weight of the halting loss; that of the MSE is 1.", WEIGHT)
    halt_threshold: float = setting(
        0.7, "Threshold of --halt-loss bce; of the first epoch only, with --adaptive-threshold.", COSINE
    )
    adaptive_threshold: bool = setting(
        True, "Set the threshold to 0.95 times the mean cosine similarity of the previous epoch."
    )
    halt_in_training: Halting = setting(
        "none", "Let confident samples leave a batch early: each by itself, or all by the batch's mean."
    )
    batch_size: int = run.batch_size(32)
    epochs: int = setting(100, "Number of passes over the data.", COUNT)
    learning_rate: float = setting(
        1e-4, "Peak learning rate: linear warm-up, then cosine decay.", LEARNING_RATE
    )
    warmup_ratio: float = run.warmup_ratio()
    weight_decay: float = setting(0.1, "Weight decay of AdamW.", WEIGHT)
    beta2: float = setting(
        0.95, "Decay of AdamW's second moments; that of the first is 0.9.", SHARE_BELOW_ONE
    )
    clip_norm: float = run.clip_norm()
    ema_decay: float = setting(
        0.999, "Decay of the moving average of the weights, which is validated and saved.", SHARE_BELOW_ONE
    )
    precision: Precision = run.precision()
    seed: int = setting(0, "Seed of the weights, the held-out part and the data order.", SEED)
    patience: int | None = setting(
        None,
        "Stop after this many epochs without a lower validation loss.",
        COUNT,
        unset="never",
        critical=False,
    )
    keep: int = run.keep()
    save_every: int | None = setting(
        None,
        "Batches between checkpoints, in addition to one per epoch.",
        COUNT,
        unset="none",
        critical=False,
    )
    log_every: int = setting(10, "Batches between logged metrics.", COUNT, critical=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.supervision_steps % self.steps_per_update:
            raise InputError(
                f"--steps-per-update {self.steps_per_update} does not divide --supervision-steps "
                f"{self.supervision_steps}: choose a divisor"
            )
        if self.halt_in_training != "none" and self.halt_loss == "none":
            raise InputError(
                f"--halt-in-training {self.halt_in_training} needs a halting head that is trained: "
                "leave --halt-loss none out"
            )
