"""Errors that the user can correct, and interruptions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from signal import SIGINT

_RUST = re.compile(r"\(os error (\d{1,4})\)|\bOs \{ code: (\d{1,4}),")


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
        """``error`` with a message that says what is kept."""
        return cls(signal_of(error), message)


def signal_of(error: KeyboardInterrupt) -> int:
    """The number of the signal that ``error`` stands for; any but our own error is Ctrl-C."""
    return error.signal if isinstance(error, Interrupted) else SIGINT


def system_error(error: BaseException) -> int | None:
    """The number of the operating system's error behind ``error``; None if there is none.

    safetensors and tokenizers, which are written in Rust, raise no OSError, but give the number in the text.
    """
    if isinstance(error, OSError):
        return error.errno
    found = _RUST.search(str(error))
    return None if found is None else int(found[1] or found[2])


def one_line(error: Exception | str, longest: int | None = 200) -> str:
    """The message of ``error`` on one line, cut to ``longest`` characters unless that is None."""
    return " ".join(str(error).split())[:longest]


def listed(names: Iterable[str], longest: int = 160) -> str:
    """``names`` on one line, separated by commas, for an error message; cut to ``longest`` characters."""
    return text if len(text := one_line(", ".join(names), None)) <= longest else f"{text[:longest]}..."


def few(names: Sequence[str], most: int = 3) -> str:
    """``names`` for an error message: the first, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return listed(names[:most]) + more
