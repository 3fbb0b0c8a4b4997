"""Rejects options that make no sense together."""

from __future__ import annotations

from collections.abc import Collection

import click
from click.core import ParameterSource


def reject_given(context: click.Context, names: Collection[str], reason: str) -> None:
    """Raise click.UsageError for the first of the parameters ``names`` that is on the command line.

    Args:
        reason: Follows the option in the message.
    """
    for parameter in context.command.params:
        name = str(parameter.name)
        if name in names and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{parameter.opts[-1]} {reason}")
