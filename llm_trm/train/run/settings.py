"""Settings that all trainings share, and the check that a resumed run has those it was started with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from llm_trm.choices import DeviceName, Precision, Track
from llm_trm.device import resolve_device
from llm_trm.errors import InputError
from llm_trm.ranges import BATCH, CLIP_NORM, COUNT, DEPTH, LAYERS, SHARE_BELOW_ONE, WIDTH
from llm_trm.settings import Settings, flat, setting, settings_of
from llm_trm.shared_settings import device

#: Ends the message about a run that cannot be continued.
START_OVER = "start over with --overwrite"


def output(default: str | None, help: str = "Folder for the model, its checkpoints and its settings.") -> Any:
    """``--output``; None for a folder that must be given."""
    path = ... if default is None else Path(default)
    return setting(path, help, None, "-o", "--output", critical=False)


def layers(default: int | None, *, unset: str = "") -> Any:
    """``--layers``."""
    return setting(default, "Number of blocks in the network.", LAYERS, "--layers", unset=unset)


def heads(default: int | None) -> Any:
    """``--heads``."""
    unset = "" if default else "8, or fewer so that each has at least 8 dimensions"
    return setting(default, "Number of attention heads.", WIDTH, "--heads", unset=unset)


def latent_steps(default: int | None, *, unset: str = "") -> Any:
    """``--latent-steps``."""
    return setting(default, "Latent steps per recursion.", DEPTH, "-n", "--latent-steps", unset=unset)


def deep_recursions(default: int | None, *, unset: str = "") -> Any:
    """``--deep-recursions``."""
    help = "Recursions per supervision step; only the last one has gradients."
    return setting(default, help, DEPTH, "-T", "--deep-recursions", unset=unset)


def batch_size(default: int) -> Any:
    """``--batch-size``."""
    return setting(default, "Batch size per process.", BATCH)


def clip_norm(default: float | None = 1.0, *, unset: str = "") -> Any:
    """``--clip-norm``."""
    return setting(default, "Maximum gradient norm.", CLIP_NORM, unset=unset)


def warmup_ratio() -> Any:
    """``--warmup-ratio``."""
    return setting(0.1, "Fraction of the updates used for warm-up.", SHARE_BELOW_ONE)


def keep() -> Any:
    """``--keep``."""
    return setting(3, "Number of best checkpoints to keep in addition to the last.", COUNT, critical=False)


def accumulation(*was: str) -> Any:
    """``--accumulation``."""
    return setting(1, "Batches per optimizer update, whose gradients are accumulated.", BATCH, was=was)


def gradient_checkpointing() -> Any:
    """``--gradient-checkpointing``."""
    return setting(
        False, "Save memory: recompute the language model's activations in the backward pass.", critical=False
    )


def precision() -> Any:
    """``--precision``."""
    return setting("auto", "bf16 trains under autocast; auto selects it on CUDA, and fp32 elsewhere.")


@dataclass(frozen=True, kw_only=True)
class RunSettings(Settings):
    """Base class of the settings of a training, which also have a field ``output``.

    Attributes:
        COMMAND: The training in ``llm-trm train COMMAND``.
        FILE: The file in ``output`` that keeps the settings.

    Raises:
        InputError: Both ``resume`` and ``overwrite``, or what :class:`~llm_trm.settings.Settings` rejects.
    """

    COMMAND: ClassVar[str]
    FILE: ClassVar[str] = "config.json"

    track: Track | None = setting(
        None, "Also log metrics to this tracker; jsonl writes metrics.jsonl in --output.", critical=False
    )
    resume: bool = setting(False, "Resume from the last checkpoint in --output.", action=True)
    overwrite: bool = setting(False, "Replace the run in --output.", action=True)
    device: DeviceName = device()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resume and self.overwrite:
            raise InputError("--resume and --overwrite cannot be used together: choose one of them")

    @property
    def device_type(self) -> str:
        """The type of the device that ``device`` means here: ``"cuda"``, ``"mps"`` or ``"cpu"``."""
        return resolve_device(self.device).type

    @property
    def bf16(self) -> bool:
        """Whether ``precision`` means bfloat16 on the device."""
        chosen: Precision = self.precision  # type: ignore[attr-defined]
        return chosen == "bf16" or (chosen == "auto" and self.device_type == "cuda")

    def require_same(self, earlier: Mapping[str, Any], now: Mapping[str, Any] | None = None) -> None:
        """Raise InputError, with every difference, unless a run can be resumed with these settings.

        Args:
            earlier: Recorded settings of the run. One that they lack, since an older version had no such
                setting, counts as its default.
            now: What must be the same; by default :attr:`critical`.
        """
        kind = type(self)
        defaults = {one.name: one.default for one in settings_of(kind) if one.default is not ...}
        values, others = flat(kind, earlier)
        # Not all of ``earlier``: its table ``reasoner`` is no value of the setting of that name.
        before = {**defaults, **{key: earlier.get(key) for key in others}, **values}
        changed = [
            f"{name} was {before.get(name)} and is {value}"
            for name, value in (self.critical if now is None else now).items()
            if before.get(name) != value
        ]
        if changed:
            folder: Path = self.output  # type: ignore[attr-defined]
            raise InputError(
                f"{folder} cannot be resumed with other settings ({'; '.join(changed)}): use those of the "
                f"run, or {START_OVER}"
            )
