"""Reads text from a file or from standard input."""

from __future__ import annotations

from pathlib import Path

from llm_trm.errors import InputError, one_line
from llm_trm.text import read_stdin, read_text


def read_input(file: Path | None, what: str) -> tuple[str, str]:
    """The text of a file, or of standard input if it is ``-`` or None, and the name of either in messages.

    Args:
        what: What the text contains, for messages.

    Raises:
        InputError: The file does not exist, or is not text in UTF-8.
    """
    stdin = file is None or str(file) == "-"
    name = "standard input" if stdin else str(file)
    try:
        return (read_stdin() if file is None or stdin else read_text(file)), name
    except FileNotFoundError:
        raise InputError(
            f"{name} does not exist: name a text file of {what}, or - for standard input"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else one_line(error)
        raise InputError(f"{name} cannot be read ({reason}): name a text file of {what} in UTF-8") from error
