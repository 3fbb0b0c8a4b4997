"""The options of the arithmetic world, for commands that draw problems from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
from click.core import ParameterSource

from llm_trm.cli.options.settings import setting_option, was_given
from llm_trm.data.arithmetic import World
from llm_trm.settings import settings_of

_NAMES = [one.name for one in settings_of(World)]


def world_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--operations``, ``--min-operations``, ``--modulus`` and ``--max-operand``; see :func:`world_from`."""
    for one in reversed(settings_of(World)):
        text = "as many as --operations" if one.name == "min_operations" else None
        command = setting_option(one, text)(command)
    return command


def world_from(context: click.Context, options: dict[str, Any]) -> World:
    """The world of :func:`world_options`, which are removed from ``options``."""
    given = {name: value for name in _NAMES if (value := options.pop(name)) is not None}
    if not was_given(context, "min_operations"):
        given["min_operations"] = given["max_operations"]
    return World(**given)


def refuse_world_options(context: click.Context, data: str, *others: str) -> None:
    """Raise click.UsageError for an option of the arithmetic world, or of ``others``, with other data."""
    if "arithmetic" in data.split(","):
        return
    for parameter in context.command.params:
        drawn = parameter.name in (*_NAMES, *others)
        if drawn and context.get_parameter_source(str(parameter.name)) is ParameterSource.COMMANDLINE:
            raise click.UsageError(
                f"{parameter.opts[-1]} is for --data arithmetic, not for {data}: leave it out"
            )
