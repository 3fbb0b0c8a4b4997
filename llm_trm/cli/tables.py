"""Tables on stdout."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

#: Columns of a table that is piped; rich would otherwise wrap it at 80.
_PIPE_WIDTH = 160


def table_console() -> Console:
    """The console to print tables on."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(width=_PIPE_WIDTH, highlight=False)


def new_table(title: str | None, first: str, others: Iterable[str], *, wrap: bool = False) -> Table:
    """A table without rows: a column of names, and columns of numbers.

    Args:
        title: Plain text; None for no title.
        first: Header of the column of names, plain text like the others.
        wrap: Whether columns of numbers may wrap.
    """
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=None if title is None else escape(title), title_justify="left")
    table.add_column(escape(first))
    for header in others:
        table.add_column(escape(header), justify="right", no_wrap=not wrap)
    return table


def with_interval(share: float, interval: tuple[float, float], digits: int = 1) -> str:
    """``50.0% [40.0, 60.0]``, escaped for a cell of a table."""
    from rich.markup import escape

    low, high = (f"{100 * bound:.{digits}f}" for bound in interval)
    return escape(f"{share:.{digits}%} [{low}, {high}]")
