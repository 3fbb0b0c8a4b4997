"""Settings that all trainings share, and the check that a resumed run has those it was started with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from llm_trm.device import resolve_device
from llm_trm.errors import InputError
from llm_trm.ranges import BATCH
from llm_trm.settings import Settings, flat, setting, settings_of


def output(default: str | None, help: str = "Folder for the model, its checkpoints and its settings.") -> Any:
    """``--output``; None for a folder that must be given."""
    path = ... if default is None else Path(default)
    return setting(path, help, None, "-o", "--output", critical=False)


def resume() -> Any:
    """``--resume``."""
    return setting(False, "Resume from the last checkpoint in --output.", action=True)


def overwrite() -> Any:
    """``--overwrite``."""
    return setting(False, "Replace the run in --output.", action=True)


def track() -> Any:
    """``--track``."""
    return setting(None, "Log metrics there as well; jsonl writes metrics.jsonl in --output.", critical=False)


def device() -> Any:
    """``--device``."""
    return setting(
        "auto", "auto selects CUDA (or ROCm) if available, else Apple's MPS, else the CPU.", critical=False
    )


def accumulation(*was: str) -> Any:
    """``--accumulation``."""
    return setting(1, "Batches per optimizer update, whose gradients are accumulated.", BATCH, was=was)


def gradient_checkpointing() -> Any:
    """``--gradient-checkpointing``."""
    return setting(
        False, "Save memory: recompute the language model's activations in the backward pass.", critical=False
    )


def trust_remote_code() -> Any:
    """``--trust-remote-code``."""
    return setting(
        False,
        "Run the Python files that a language model needs. They can do whatever you can: read them first.",
        critical=False,
    )


def precision() -> Any:
    """``--precision``."""
    return setting("auto", "bf16 trains under autocast; auto selects it on CUDA, and fp32 elsewhere.")


@dataclass(frozen=True)
class RunSettings(Settings):
    """Base class of the settings of a training, which have a field ``output``.

    Attributes:
        COMMAND: The training in ``llm-trm train COMMAND``.
        FILE: The file in ``output`` that keeps the settings.

    Raises:
        InputError: Both ``resume`` and ``overwrite``, or what :class:`~llm_trm.settings.Settings` rejects.
    """

    COMMAND: ClassVar[str]
    FILE: ClassVar[str] = "config.json"

    def __post_init__(self) -> None:
        super().__post_init__()
        if getattr(self, "resume", False) and getattr(self, "overwrite", False):
            raise InputError("--resume and --overwrite exclude each other: choose one of them")

    @property
    def device_type(self) -> str:
        """The type of the device that ``device`` means here: ``"cuda"``, ``"mps"`` or ``"cpu"``."""
        name: str = self.device  # type: ignore[attr-defined]
        return resolve_device(name).type

    def require_same(self, earlier: Mapping[str, Any]) -> None:
        """Raise InputError unless a run with the recorded settings ``earlier`` can be resumed with these.

        A setting that ``earlier`` lacks, recorded by a version that did not have it, counts as its default.
        """
        kind = type(self)
        defaults = {one.name: one.default for one in settings_of(kind) if one.default is not ...}
        folder: Path = self.output  # type: ignore[attr-defined]
        require_same(folder, defaults | flat(kind, earlier)[0], self.critical)


def require_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise InputError, with every difference, unless ``before`` has the values of ``now``."""
    changed = [
        f"{name} was {before.get(name)} and is {value}"
        for name, value in now.items()
        if before.get(name) != value
    ]
    if changed:
        raise InputError(
            f"{folder} cannot be resumed with other settings ({'; '.join(changed)}): use those of the run, "
            "or start over with --overwrite"
        )
