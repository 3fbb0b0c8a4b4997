"""Settings of puzzle training, and the presets that fill them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from llm_trm.choices import CellLoss, Mixer, Positions, Precision, Task
from llm_trm.errors import InputError
from llm_trm.ranges import (
    BATCH,
    COUNT,
    DEPTH,
    LEARNING_RATE,
    NO_OR_COUNT,
    NO_OR_LENGTH,
    SEED,
    SHARE,
    SHARE_BELOW_ONE,
    WEIGHT,
    WIDTH,
)
from llm_trm.settings import Setting, setting, settings_of
from llm_trm.train.run import settings as run
from llm_trm.train.run.settings import RunSettings

Preset = Literal["paper", "tiny"]


@dataclass(frozen=True)
class PuzzleConfig(RunSettings):
    """Settings of a :class:`~llm_trm.train.puzzle.trainer.PuzzleTrainer`; the defaults are the paper's.

    Raises:
        InputError: A value out of range, or settings that contradict each other.
    """

    COMMAND = "puzzle"

    data: Path = setting(..., "Folder of puzzles from llm-trm data.", critical=False)
    output: Path = run.output(None)
    steps: int = setting(65_100, "Number of supervision steps, each with an update.", COUNT, critical=False)
    batch_size: int = setting(768, "Number of samples in flight.", BATCH)
    learning_rate: float = setting(1e-4, "Learning rate after the warm-up.", LEARNING_RATE)
    warmup_steps: int = setting(2000, "Steps of linear warm-up.", NO_OR_COUNT)
    schedule: Literal["constant", "cosine"] = setting(
        "constant", "Learning rate after the warm-up: constant, or cosine decay to 0 at --steps."
    )
    optimizer: Literal["adamw", "adam-atan2"] = setting("adam-atan2", "Optimizer of the dense parameters.")
    weight_decay: float = setting(1.0, "Decoupled weight decay of the dense parameters.", WEIGHT)
    puzzle_learning_rate: float = setting(
        1e-4, "Learning rate of the puzzle embeddings (sign-SGD).", LEARNING_RATE
    )
    puzzle_weight_decay: float = setting(1.0, "Weight decay of the puzzle embeddings.", WEIGHT)
    clip_norm: float | None = run.clip_norm(None, unset="no clipping")
    ema_decay: float = setting(
        0.999, "Decay of the moving average of the weights, which is evaluated and saved.", SHARE_BELOW_ONE
    )
    cell_loss: CellLoss = setting("stablemax", "How the logits of a cell become probabilities.")
    exploration: float = setting(
        0.1, "Probability that a sample must continue for a random number of steps.", SHARE
    )
    d_model: int = setting(512, "Width of the network.", WIDTH)
    n_layers: int = run.layers(2)
    n_heads: int = run.heads(8)
    mixer: Mixer = setting("attention", "Attention, or an MLP over positions (mlp_t).")
    positions: Positions = setting("rope", "Position encoding.")
    puzzle_len: int = setting(16, "Positions in front of the puzzle for its embedding.", NO_OR_LENGTH)
    puzzle_dim: int = setting(512, "Size of a puzzle embedding; 0 for none.", NO_OR_LENGTH)
    n_latent_steps: int = run.latent_steps(6)
    n_deep_recursions: int = run.deep_recursions(3)
    max_steps: int = setting(16, "Maximum number of supervision steps per sample.", DEPTH)
    augment: bool = setting(True, "Apply a random symmetry of the task to every sample.")
    precision: Precision = setting(
        "auto", "Precision of the residual stream; auto selects bf16 on CUDA, and fp32 elsewhere."
    )
    nograd_precision: Literal["fp8"] | None = setting(
        None,
        "fp8 runs the recursions without gradient in fp8 (compute capability 9.0).",
        unset="as --precision",
    )
    seed: int = setting(0, "Seed of the weights, the data order, augmentation and exploration.", SEED)
    eval_every: int = setting(
        5000, "Steps between evaluations, each with a checkpoint.", COUNT, critical=False
    )
    eval_samples: int = setting(
        512,
        "Number of test puzzles per evaluation, the same for every seed; 0 for none. llm-trm eval puzzle "
        "evaluates all of them.",
        NO_OR_COUNT,
        critical=False,
    )
    save_every: int | None = setting(
        None,
        "Steps between checkpoints, in addition to those of evaluations.",
        COUNT,
        unset="none",
        critical=False,
    )
    keep: int = run.keep()
    log_every: int = setting(20, "Steps between logged metrics.", COUNT, critical=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mixer == "tokens" and self.positions != "none":
            raise InputError(
                "--mixer tokens has no position encoding: choose --positions none instead of --positions "
                f"{self.positions}"
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

    @property
    def critical(self) -> dict[str, Any]:
        """See :attr:`Settings.critical`; a cosine schedule also depends on the number of steps."""
        return super().critical | ({"steps": self.steps} if self.schedule == "cosine" else {})


#: Settings of the official commands that differ from the defaults above.
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
    """The settings of a preset for a task that differ from the defaults of :class:`PuzzleConfig`."""
    if name == "paper":
        return _PAPER[task]
    return {**_TINY, **_TINY_TASKS.get(task, {})}


def configure(name: Preset, task: Task, **given: Any) -> PuzzleConfig:
    """The settings of a preset, except those that are given; None is for none, or for not given.

    A given mixer decides on the position encoding, unless that is given too.
    """
    optional = {one.name for one in settings_of(PuzzleConfig) if one.optional}
    given = {key: value for key, value in given.items() if value is not None or key in optional}
    chosen = preset(name, task)
    mixer = given.get("mixer", chosen.get("mixer", "attention"))
    if mixer != chosen.get("mixer", "attention"):
        chosen = chosen | {"positions": "none" if mixer == "tokens" else "rope"}
    return PuzzleConfig(**chosen | given)


def preset_texts() -> dict[str, str]:
    """The defaults of the settings that presets change, for the help."""
    texts = {}
    for one in settings_of(PuzzleConfig):
        found = {name: _defaults(name, one) for name in get_args(Preset)}
        if found["paper"] != found["tiny"] or len(found["paper"]) > 1:
            texts[one.name] = "; ".join(f"{name} {' or '.join(values)}" for name, values in found.items())
    return texts


def _defaults(name: Preset, one: Setting) -> list[str]:
    values = [preset(name, task).get(one.name, one.default) for task in get_args(Task)]
    return sorted({one.unset if value is None else str(value) for value in values})
