"""The options that say which arithmetic problems there are, for the commands that draw some."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import click

from llm_trm.cli.options.types import COUNT, MODULUS, OPERATIONS

_Command = TypeVar("_Command", bound=Callable[..., object])


def world_options(*, fewest: int | None = None) -> Callable[[_Command], _Command]:
    """``--operations``, ``--min-operations``, ``--modulus`` and ``--max-operand``.

    Args:
        fewest: Default of ``--min-operations``; None for as many as ``--operations``.
    """
    default = "[default: as many as --operations]" if fewest is None else f"[default: {fewest}]"
    options = (
        click.option(
            "--operations",
            type=OPERATIONS,
            default=5,
            show_default=True,
            help="Most operations of an arithmetic problem: its difficulty.",
        ),
        click.option(
            "--min-operations",
            type=OPERATIONS,
            default=fewest,
            help=f"Fewest operations of an arithmetic problem. {default}",
        ),
        click.option(
            "--modulus",
            type=MODULUS,
            default=10,
            show_default=True,
            help="Totals of arithmetic problems are taken modulo this number.",
        ),
        click.option(
            "--max-operand",
            type=COUNT,
            help="Largest number behind the first of an arithmetic problem; smaller is easier. "
            "[default: modulus - 1]",
        ),
    )

    def add(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add
