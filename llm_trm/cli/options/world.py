"""The options of the arithmetic world, for commands that draw problems of one difficulty from it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import click

from llm_trm.cli.options.combinations import reject_given
from llm_trm.cli.options.settings import was_given
from llm_trm.data.arithmetic import World
from llm_trm.settings import settings_of

#: For :func:`~llm_trm.cli.options.settings.settings_options`; see :func:`set_difficulty`.
SAME_DIFFICULTY = {"min_operations": "the same as --operations"}


def set_difficulty(context: click.Context, given: dict[str, Any]) -> None:
    """Give all problems of ``given["world"]`` --operations operations, unless --min-operations is given."""
    if not was_given(context, "min_operations"):
        world: World = given.get("world", World())
        given["world"] = replace(world, min_operations=world.max_operations)


def refuse_world_options(context: click.Context, data: str, *others: str) -> None:
    """Raise click.UsageError for an option of the arithmetic world, or of ``others``, with other data."""
    if "arithmetic" not in data.split(","):
        names = {*(one.name for one in settings_of(World)), *others}
        reject_given(context, names, f"is for --data arithmetic, not for {data}: leave it out")
