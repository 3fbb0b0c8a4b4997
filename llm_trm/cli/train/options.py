"""The options that say where a training runs and what becomes of it, for the commands that train."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import click

from llm_trm.cli.options.device import device_option

_Command = TypeVar("_Command", bound=Callable[..., object])


def run_options(command: _Command) -> _Command:
    """``--track``, ``--resume``, ``--overwrite`` and ``--device``."""
    options = (
        click.option(
            "--track",
            type=click.Choice(["wandb", "tensorboard", "jsonl"]),
            help="Log metrics there; jsonl is metrics.jsonl in --output.",
        ),
        click.option("--resume", is_flag=True, help="Go on from the last checkpoint in --output."),
        click.option("--overwrite", is_flag=True, help="Replace the run in --output."),
        device_option,
    )
    for option in reversed(options):
        command = option(command)
    return command
