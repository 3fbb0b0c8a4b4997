"""The ``--device`` option of commands without a settings dataclass."""

from __future__ import annotations

from typing import get_args

import click

from llm_trm.choices import DeviceName

device_option = click.option(
    "--device",
    type=click.Choice(get_args(DeviceName)),
    default="auto",
    show_default=True,
    help="auto selects CUDA (or ROCm) if available, else Apple's MPS, else the CPU.",
)
