"""Checks output paths before any work starts."""

from __future__ import annotations

import os
from pathlib import Path

import click


def output_file(_context: click.Context, _parameter: click.Parameter, value: Path | None) -> Path | None:
    """A click callback that rejects a file that cannot be written; it creates nothing."""
    if value is None:
        return None
    folder = value.parent
    if value.is_dir():
        raise click.BadParameter(f"{value} is a folder; name a file in it")
    if not folder.is_dir():
        raise click.BadParameter(f"the folder {folder} does not exist; create it first")
    if not os.access(value if value.exists() else folder, os.W_OK):
        raise click.BadParameter(f"{value} cannot be written; choose another path")
    return value
