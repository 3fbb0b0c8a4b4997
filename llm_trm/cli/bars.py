"""Progress bars on stderr, shown only on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar that disappears at the end; yields the function that advances it."""
    with passing_bar() as bar:
        task = bar.add_task(what, total=total, numbers="")
        yield lambda done: bar.advance(task, done)


def passing_bar(*, disable: bool = False) -> Progress:
    """A bar like :func:`training_bar` that disappears at the end."""
    return _bar(None, transient=True, disable=disable)


def training_bar(console: Console | None = None) -> Progress:
    """A bar whose tasks have a field ``numbers``, shown after it; ``disable`` is set without a terminal."""
    return _bar(console, transient=False, disable=False)


def _bar(console: Console | None, *, transient: bool, disable: bool) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = console or Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}"),
        console=console,
        transient=transient,
        disable=disable or not console.is_terminal,
    )
