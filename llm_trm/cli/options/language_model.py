"""Options of commands that let a language model answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llm_trm.errors import InputError
from llm_trm.settings import Settings, setting
from llm_trm.shared_settings import trust_remote_code

DEFAULT_CHECKPOINT = Path("runs/lora")


@dataclass(frozen=True)
class ModelChoice(Settings):
    """Which language model answers."""

    checkpoint: str | None = setting(
        None,
        "Model with a recursion: a folder from llm-trm train lora or train phase3, or a name on the hub.",
        metavar="NAME",
        unset="runs/lora, if --model is not given",
    )
    model: str | None = setting(
        None,
        "Plain language model, loaded without a recursion: a folder in Hugging Face format, a name on the "
        "hub, or arithmetic, the bundled model.",
        metavar="NAME",
        unset="the base model of --checkpoint",
    )
    trust_remote_code: bool = trust_remote_code()


def chosen_checkpoint(checkpoint: str | None, model: str | None) -> str | None:
    """The checkpoint to load; None if only a plain model is named.

    Raises:
        InputError: Neither is named, and the default folder does not exist.
    """
    if checkpoint is not None or model is not None:
        return checkpoint
    if not DEFAULT_CHECKPOINT.is_dir():
        raise InputError(
            f"there is no model in {DEFAULT_CHECKPOINT}: train one with `llm-trm train lora`, or name one "
            "with --checkpoint, or a plain one with --model, for example arithmetic"
        )
    return str(DEFAULT_CHECKPOINT)


@contextmanager
def memory_advice() -> Iterator[None]:
    """Turn an out-of-memory error of the device into one line with a remedy."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError("the device ran out of memory: lower --batch-size or --max-new-tokens") from error
