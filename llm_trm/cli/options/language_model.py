"""Options that commands share which let a language model answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import click

_Command = TypeVar("_Command", bound=Callable[..., object])

DEFAULT_CHECKPOINT = Path("runs/lora")


#: ``--trust-remote-code``, of every command that loads a language model.
trust_option = click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Run the Python files that a language model brings, if it needs them. They can do whatever you can: "
    "read them first.",
)


def model_options(command: _Command) -> _Command:
    """``--checkpoint``, ``--model`` and ``--trust-remote-code``."""
    command = trust_option(command)
    command = click.option(
        "--model",
        metavar="NAME",
        help="A plain language model: a folder in Hugging Face format, a name on the hub, or arithmetic, "
        "which ships. [default: what --checkpoint was made of; named, it is loaded by itself]",
    )(command)
    return click.option(
        "--checkpoint",
        metavar="NAME",
        help="A model with a recursion: a folder that `llm-trm train lora` or `train phase3` wrote, or its "
        "name on the hub. [default: runs/lora, if --model is not given]",
    )(command)


def chosen_checkpoint(checkpoint: str | None, model: str | None) -> str | None:
    """What ``--checkpoint`` means.

    Raises:
        InputError: Nothing is named, and there is no model in the default place.
    """
    from llm_trm.errors import InputError

    if checkpoint is not None or model is not None:
        return checkpoint
    if not DEFAULT_CHECKPOINT.is_dir():
        raise InputError(
            f"there is no model in {DEFAULT_CHECKPOINT}: train one with `llm-trm train lora`, name one by "
            "--checkpoint, or a plain one by --model, for instance arithmetic"
        )
    return str(DEFAULT_CHECKPOINT)


@contextmanager
def memory_advice() -> Iterator[None]:
    """Turns running out of a device's memory into one line."""
    import torch

    from llm_trm.errors import InputError

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError("the device ran out of memory: lower --batch-size or --max-new-tokens") from error
