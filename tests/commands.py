"""All commands of ``llm-trm``, for tests that hold for each of them."""

from __future__ import annotations

from collections.abc import Iterator

import click

from llm_trm.cli import main


def commands(
    command: click.Command = main, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """The words by which each command is called, and the command; groups are not among them."""
    if not isinstance(command, click.Group):
        yield path, command
        return
    context = click.Context(command)
    for name in command.list_commands(context):
        inner = command.get_command(context, name)
        assert inner is not None
        yield from commands(inner, (*path, name))
