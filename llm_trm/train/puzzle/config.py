"""Settings of puzzle training, and the presets that fill them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from llm_trm.data.puzzles.dataset import Task
from llm_trm.errors import InputError
from llm_trm.models.puzzle.losses import CellLoss
from llm_trm.models.puzzle.paper import Positions
from llm_trm.ranges import (
    BATCH,
    CLIP_NORM,
    COUNT,
    DEPTH,
    LAYERS,
    LEARNING_RATE,
    NO_OR_COUNT,
    NO_OR_LENGTH,
    SEED,
    SHARE,
    SHARE_BELOW_ONE,
    WEIGHT,
    WIDTH,
    require_ranges,
)
from llm_trm.train.run.config import as_json
from llm_trm.train.run.tracking import Track
from trm_kernels.config import Mixer

Preset = Literal["paper", "tiny"]
PuzzleOptimizer = Literal["adamw", "adam-atan2"]
Schedule = Literal["constant", "cosine"]
Precision = Literal["auto", "bf16", "fp32"]

#: Settings that do not decide what the weights become.
_NOT_CRITICAL = {
    *("data", "output", "device", "steps", "keep", "track", "resume", "overwrite"),
    *("log_every", "eval_every", "eval_samples", "save_every"),
}


@dataclass(frozen=True)
class PuzzleConfig:
    """Settings of a :class:`PuzzleTrainer`.

    Attributes:
        data: Folder of puzzles that ``llm-trm data`` wrote.
        output: Folder of the run.
        mixer, positions, d_model, n_layers, n_heads, puzzle_len, puzzle_dim, n_latent_steps,
            n_deep_recursions, max_steps: See :class:`~llm_trm.models.puzzle.paper.PuzzleTRMConfig`.
        steps: Supervision steps, each with an update.
        batch_size: Samples in flight.
        optimizer: Of the parameters.
        learning_rate: After the warm-up.
        warmup_steps: Steps over which it rises.
        schedule: ``"constant"`` as in the paper, or ``"cosine"``, which would reach 0 at ``steps``.
        weight_decay: Decoupled.
        puzzle_learning_rate, puzzle_weight_decay: Of the sign-SGD of the puzzle embeddings.
        clip_norm: Largest gradient norm; None for no clipping, as in the paper.
        ema_decay: Of the average of the weights, which is what is evaluated and saved.
        cell_loss: Kind of cross-entropy.
        exploration: Probability with which a sample must go on for a random number of steps.
        augment: Whether every sample is turned by a random symmetry of its task.
        precision: Of the residual stream; ``"auto"`` takes bf16 on CUDA and fp32 elsewhere.
        nograd_precision: ``"fp8"`` runs the recursions without gradient in fp8 (compute capability 9.0).
        seed: Of weights, order, augmentation and exploration.
        eval_every: Steps between evaluations, each of which ends with a checkpoint.
        eval_samples: Test puzzles of such an evaluation, drawn at random, for all seeds the same; 0 for no
            evaluation.
        save_every: Steps between further checkpoints.
        keep: Checkpoints kept for their accuracy.
        log_every: Steps between two reads of the training metrics.
        resume: Go on from the last checkpoint in ``output``.
        overwrite: Replace the run in ``output``.
        track: Where metrics are logged.
        device: ``"auto"``, ``"cuda"``, ``"mps"`` or ``"cpu"``.
    """

    data: Path
    output: Path
    mixer: Mixer = "attention"
    positions: Positions = "rope"
    d_model: Annotated[int, WIDTH] = 512
    n_layers: Annotated[int, LAYERS] = 2
    n_heads: Annotated[int, WIDTH] = 8
    puzzle_len: Annotated[int, NO_OR_LENGTH] = 16
    puzzle_dim: Annotated[int, NO_OR_LENGTH] = 512
    n_latent_steps: Annotated[int, DEPTH] = 6
    n_deep_recursions: Annotated[int, DEPTH] = 3
    max_steps: Annotated[int, DEPTH] = 16
    steps: Annotated[int, COUNT] = 65_100
    batch_size: Annotated[int, BATCH] = 768
    optimizer: PuzzleOptimizer = "adam-atan2"
    learning_rate: Annotated[float, LEARNING_RATE] = 1e-4
    warmup_steps: Annotated[int, NO_OR_COUNT] = 2000
    schedule: Schedule = "constant"
    weight_decay: Annotated[float, WEIGHT] = 1.0
    puzzle_learning_rate: Annotated[float, LEARNING_RATE] = 1e-4
    puzzle_weight_decay: Annotated[float, WEIGHT] = 1.0
    clip_norm: Annotated[float, CLIP_NORM] | None = None
    ema_decay: Annotated[float, SHARE_BELOW_ONE] = 0.999
    cell_loss: CellLoss = "stablemax"
    exploration: Annotated[float, SHARE] = 0.1
    augment: bool = True
    precision: Precision = "auto"
    nograd_precision: Literal["fp8"] | None = None
    seed: Annotated[int, SEED] = 0
    eval_every: Annotated[int, COUNT] = 5000
    eval_samples: Annotated[int, NO_OR_COUNT] = 512
    save_every: Annotated[int, COUNT] | None = None
    keep: Annotated[int, COUNT] = 3
    log_every: Annotated[int, COUNT] = 20
    resume: bool = False
    overwrite: bool = False
    track: Track | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        require_ranges(self, InputError)
        if self.mixer == "tokens" and self.positions != "none":
            raise InputError(
                f"--mixer tokens has no position encoding: leave --positions {self.positions} out"
            )
        if self.mixer == "attention" and self.d_model % self.n_heads:
            raise InputError(
                f"--heads {self.n_heads} does not divide --d-model {self.d_model}: choose a divisor"
            )
        if self.positions == "rope" and self.d_model // self.n_heads % 2:
            raise InputError(
                f"RoPE needs heads of an even size, not {self.d_model // self.n_heads}: choose another "
                "--d-model or --heads, or --positions learned"
            )
        if self.puzzle_dim > self.puzzle_len * self.d_model:
            raise InputError(
                f"--puzzle-dim {self.puzzle_dim} does not fit --puzzle-len {self.puzzle_len} positions of "
                f"{self.d_model}: choose a larger --puzzle-len, or --puzzle-dim 0"
            )
        if self.resume and self.overwrite:
            raise InputError("--resume and --overwrite exclude each other: leave one out")

    @property
    def critical(self) -> dict[str, Any]:
        """The settings that a resumed run must share with the run that it resumes."""
        skipped = _NOT_CRITICAL - ({"steps"} if self.schedule == "cosine" else set())
        return {name: value for name, value in asdict(self).items() if name not in skipped}

    def to_json(self) -> dict[str, Any]:
        """All settings as JSON values."""
        return as_json(self)


#: What the official commands set besides the defaults above.
_PAPER: dict[Task, dict[str, Any]] = {
    "sudoku": {"mixer": "tokens", "positions": "none"},
    "maze": {"n_latent_steps": 4},
    "arc": {
        "n_latent_steps": 4,
        "weight_decay": 0.1,
        "puzzle_weight_decay": 0.1,
        "puzzle_learning_rate": 1e-2,
    },
}

_TINY: dict[str, Any] = {
    "d_model": 64,
    "n_heads": 4,
    "puzzle_len": 1,
    "puzzle_dim": 0,
    "n_latent_steps": 3,
    "n_deep_recursions": 2,
    "max_steps": 8,
    "steps": 1000,
    "batch_size": 128,
    "optimizer": "adamw",
    "learning_rate": 2e-3,
    "warmup_steps": 100,
    "schedule": "cosine",
    "weight_decay": 0.1,
    "clip_norm": 1.0,
    "ema_decay": 0.99,
    "eval_every": 200,
}

_TINY_TASKS: dict[Task, dict[str, Any]] = {"sudoku": {"mixer": "tokens", "positions": "none"}}


def preset(name: Preset, task: Task) -> dict[str, Any]:
    """What a preset sets for a task, besides the defaults: fields of :class:`PuzzleConfig`."""
    if name == "paper":
        return _PAPER[task]
    return {**_TINY, **_TINY_TASKS.get(task, {})}


def configure(name: Preset, task: Task, **given: Any) -> PuzzleConfig:
    """The settings of a preset, but for those that are given and not None.

    A given mixer decides on the position encoding, unless that is given too.
    """
    chosen = {**preset(name, task)}
    if given.get("mixer") is not None and given["mixer"] != chosen.get("mixer", "attention"):
        chosen["positions"] = "none" if given["mixer"] == "tokens" else "rope"
    names = {field.name for field in fields(PuzzleConfig)}
    return PuzzleConfig(
        **{
            **chosen,
            **{key: value for key, value in given.items() if value is not None and key in names},
        }
    )
