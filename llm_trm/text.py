"""Reads user-supplied text: UTF-8, with or without byte order marks; only a newline ends a line.

Python's own readers disagree: standard input keeps a byte order mark and follows the locale, and
``str.splitlines`` also splits at form feeds, U+0085 and U+2028. One text would yield different questions.
"""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

_MARK = "\ufeff"
#: Bytes of the longest line: /dev/zero would fill the memory with one, before Python reacts to Ctrl-C.
_LONGEST_LINE = 2**30
_NUL = "a NUL, as found in UTF-16 text,"


def read_lines(path: Path, *, only_text: bool = False) -> Iterator[str]:
    """Yield the lines of a file without their line endings (a newline, or carriage return and newline).

    Args:
        path: The file to read.
        only_text: Skip lines that are not text, which a crash can leave behind, instead of raising.

    Raises:
        OSError: The file cannot be read, or has a line of over 1 GiB, as endless devices have.
        UnicodeDecodeError: The file is not UTF-8 or contains a NUL; ``reason`` names the line.
    """
    with path.open("rb") as file:
        yield from _decoded(file, only_text)


def csv_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a file, with newlines, for ``csv``: a cell may span several lines."""
    return (f"{line}\n" for line in read_lines(path))


def read_text(path: Path) -> str:
    """Read a file with newlines as line endings. Raises the errors of :func:`read_lines`."""
    return "\n".join(read_lines(path))


def read_stdin() -> str:
    """Read standard input as UTF-8 whatever the locale. Raises the errors of :func:`read_lines`."""
    return "\n".join(_decoded(sys.stdin.buffer))


def split_lines(text: str) -> list[str]:
    """Split text that still has its byte order marks, such as an argument, into lines."""
    return [line.removesuffix("\r").removeprefix(_MARK) for line in text.split("\n")]


def normalise_spaces(text: str) -> str:
    """Normalise whitespace to compare questions: strip the ends and collapse runs to one space."""
    return " ".join(text.split())


def parse_json(text: str) -> Any:
    """Parse JSON whose strings must all be encodable text.

    Raises:
        ValueError: The text is not JSON, nests too deeply, or escapes half of a surrogate pair.
    """
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it nests too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("it contains half of a surrogate pair, which is not a character") from None
    return value


def is_text(argument: str) -> bool:
    """Whether a command-line argument is valid text; Python passes undecodable bytes as surrogates."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in argument


def _decoded(file: IO[bytes], only_text: bool = False) -> Iterator[str]:
    # Splitting bytes at newlines is safe: no multi-byte UTF-8 character contains one.
    for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE), b""), 1):
        if len(line) == _LONGEST_LINE and not line.endswith(b"\n"):
            raise OSError(errno.EFBIG, f"line {number} is longer than {_LONGEST_LINE:,} bytes")
        try:
            text = line.decode()
            if (at := line.find(b"\0")) >= 0:
                raise UnicodeDecodeError("utf-8", line, at, at + 1, _NUL)
        except UnicodeDecodeError as error:
            if only_text:
                continue
            error.reason = f"{error.reason} in line {number}"
            raise
        # A concatenation of files has a byte order mark at the start of each.
        yield text.removesuffix("\n").removesuffix("\r").removeprefix(_MARK)
