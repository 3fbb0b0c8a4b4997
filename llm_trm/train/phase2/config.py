"""Settings of phase 2."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from llm_trm.errors import InputError
from llm_trm.models.sequence_trm import Halting
from llm_trm.ranges import (
    BATCH,
    CLIP_NORM,
    COSINE,
    COUNT,
    DEPTH,
    HELD_OUT,
    LAYERS,
    LEARNING_RATE,
    SEED,
    SHARE_BELOW_ONE,
    WEIGHT,
    WIDTH,
    require_ranges,
)
from llm_trm.train.phase2.losses import HaltLoss
from llm_trm.train.run.config import as_json
from llm_trm.train.run.tracking import Track

#: ``--precision``: bf16 is autocast; auto takes it on CUDA and fp32 elsewhere.
Precision = Literal["auto", "bf16", "fp32"]

#: Settings that do not decide what the weights become.
_NOT_CRITICAL = {
    *("data", "val_data", "compressor", "output", "device"),
    *("patience", "keep", "save_every", "log_every", "track", "resume", "overwrite"),
}


@dataclass(frozen=True)
class Phase2Config:
    """Settings of a :class:`TRMSequenceTrainer`.

    Defaults are those of the paper and of anonx3247/llm-trm, but for dropout, which that one has at 0.1.

    Attributes:
        data: Folder of pairs that ``llm-trm datagen`` wrote.
        compressor: Folder of a compressor that ``llm-trm train phase1`` wrote.
        output: Folder of the run.
        val_data: Folder of held-out pairs; by default a part of ``data`` is held out.
        val_fraction: That part, in (0, 0.5].
        n_layers, n_heads: Blocks of the network and heads of a block; by default 8 heads, or as many fewer as
            leave each at least 8 wide.
        n_latent_steps, n_deep_recursions: n and T of the recursion.
        dropout: Probability of dropping an attention weight in training.
        supervision_steps: N_sup, deep recursions a batch, each with a loss.
        steps_per_update: Supervision steps whose gradients one update averages; divides N_sup.
        halt_loss, halt_weight: Kind of the halting loss, and its weight beside the MSE.
        halt_threshold: Cosine similarity above which a state is good enough, for ``halt_loss="bce"``.
        adaptive_threshold: Whether it follows 0.95 x the mean cosine similarity of the epoch before.
        halt_in_training: Whose confidence ends a sample's supervision steps on a batch.
        batch_size: Samples of a batch, of one process.
        epochs: Passes over the data.
        learning_rate: Peak of the schedule: linear warm-up over ``warmup_ratio`` of the updates, then cosine.
        warmup_ratio: In [0, 1).
        weight_decay: Of AdamW, with betas 0.9 and 0.95.
        clip_norm: Largest gradient norm.
        ema_decay: Of the average of the weights, which is what is validated and used.
        precision: ``"bf16"`` trains under autocast.
        seed: Of weights, held-out part, order and dropout.
        patience: Epochs without a lower validation loss after which training stops; None for never.
        keep: Checkpoints kept for their validation loss.
        save_every: Batches between checkpoints, besides one each epoch.
        log_every: Batches between two reads of the training metrics.
        resume: Go on from the last checkpoint in ``output``.
        overwrite: Replace the run in ``output``.
        track: Where metrics are logged.
        device: ``"auto"`` or ``"cpu"``.
    """

    data: Path
    compressor: Path
    output: Path
    val_data: Path | None = None
    val_fraction: Annotated[float, HELD_OUT] = 0.05
    n_layers: Annotated[int, LAYERS] = 2
    n_heads: Annotated[int, WIDTH] | None = None
    n_latent_steps: Annotated[int, DEPTH] = 6
    n_deep_recursions: Annotated[int, DEPTH] = 3
    dropout: Annotated[float, SHARE_BELOW_ONE] = 0.0
    supervision_steps: Annotated[int, DEPTH] = 8
    steps_per_update: Annotated[int, DEPTH] = 1
    halt_loss: HaltLoss = "mse"
    halt_weight: Annotated[float, WEIGHT] = 0.5
    halt_threshold: Annotated[float, COSINE] = 0.7
    adaptive_threshold: bool = True
    halt_in_training: Halting = "none"
    batch_size: Annotated[int, BATCH] = 32
    epochs: Annotated[int, COUNT] = 100
    learning_rate: Annotated[float, LEARNING_RATE] = 1e-4
    warmup_ratio: Annotated[float, SHARE_BELOW_ONE] = 0.1
    weight_decay: Annotated[float, WEIGHT] = 0.1
    clip_norm: Annotated[float, CLIP_NORM] = 1.0
    ema_decay: Annotated[float, SHARE_BELOW_ONE] = 0.999
    precision: Precision = "auto"
    seed: Annotated[int, SEED] = 0
    patience: Annotated[int, COUNT] | None = None
    keep: Annotated[int, COUNT] = 3
    save_every: Annotated[int, COUNT] | None = None
    log_every: Annotated[int, COUNT] = 10
    resume: bool = False
    overwrite: bool = False
    track: Track | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        require_ranges(self, InputError)
        if self.supervision_steps % self.steps_per_update:
            raise InputError(
                f"--steps-per-update {self.steps_per_update} does not divide --supervision-steps "
                f"{self.supervision_steps}: choose a divisor"
            )
        if not 0.0 < self.val_fraction <= 0.5:
            raise InputError(f"--val-fraction {self.val_fraction} must be above 0 and at most 0.5")
        if self.halt_in_training != "none" and self.halt_loss == "none":
            raise InputError(
                f"--halt-in-training {self.halt_in_training} needs a halting head that is trained: "
                "leave --halt-loss none out"
            )
        if self.resume and self.overwrite:
            raise InputError("--resume and --overwrite exclude each other")

    @property
    def critical(self) -> dict[str, Any]:
        """The settings that a resumed run must share with the run that it resumes."""
        return {name: value for name, value in asdict(self).items() if name not in _NOT_CRITICAL}

    def to_json(self) -> dict[str, Any]:
        """All settings as JSON values."""
        return as_json(self)
