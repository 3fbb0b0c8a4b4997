"""Errors that the user can correct, and interruptions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from signal import SIGINT


class InputError(ValueError):
    """Invalid input. The message is one line that names the file or option at fault and the remedy.

    The command line prints it and exits with code 2.
    """


class Interrupted(KeyboardInterrupt):
    """A signal stopped the work; the message says how to continue, if that is possible.

    Attributes:
        signal: Number of the signal.
    """

    def __init__(self, signal: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal

    @classmethod
    def during(cls, error: KeyboardInterrupt, message: str) -> Interrupted:
        """``error`` with a message that says what is kept; any but our own error is Ctrl-C."""
        return cls(error.signal if isinstance(error, Interrupted) else SIGINT, message)


def one_line(error: Exception | str, longest: int | None = 200) -> str:
    """The message of ``error`` on one line, cut to ``longest`` characters unless that is None."""
    return " ".join(str(error).split())[:longest]


def shortened(question: str, longest: int = 40) -> str:
    """Quote ``question`` for an error message, shortened to ``longest`` characters."""
    return repr(question) if len(question) <= longest else f"{question[:longest]!r}..."


def listed(names: Iterable[str], longest: int = 160) -> str:
    """``names``, separated by commas, for an error message; shortened to ``longest`` characters."""
    return text if len(text := ", ".join(names)) <= longest else f"{text[:longest]}..."


def few(names: Sequence[str], most: int = 3) -> str:
    """``names`` for an error message: the first, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return listed(names[:most]) + more
