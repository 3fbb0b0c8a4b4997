"""Text that somebody hands in: UTF-8, with byte order marks or without; a newline alone ends a line.

Python's own ways differ from one another: standard input keeps a byte order mark and follows the locale,
``str.splitlines`` cuts at form feeds, U+0085 and U+2028 too, and each of these makes other questions of it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_MARK = "\ufeff"
_NUL = "a NUL, as text in UTF-16 has them,"


def read_lines(path: Path, *, only_text: bool = False) -> Iterator[str]:
    """The lines of a file, without what ends them: a newline, or a carriage return and a newline.

    Args:
        path: Of the file.
        only_text: Leave out lines that are no text, as a crash may leave some, instead of refusing them.

    Raises:
        OSError: It cannot be read.
        UnicodeDecodeError: It is not UTF-8, or holds a NUL; ``reason`` says in which line.
    """
    with path.open("rb") as file:
        yield from _decoded(file, only_text)


def csv_lines(path: Path) -> Iterator[str]:
    """The lines of a file as ``csv`` takes them: the newlines belong to cells that have several lines."""
    return (f"{line}\n" for line in read_lines(path))


def read_text(path: Path) -> str:
    """The lines of a file, joined by newlines. Raises as :func:`read_lines`."""
    return "\n".join(read_lines(path))


def read_stdin() -> str:
    """Standard input to its end, whatever the locale says. Raises as :func:`read_lines`."""
    return "\n".join(_decoded(sys.stdin.buffer))


def lines_of(text: str) -> list[str]:
    """The lines of ``text`` in which nobody has cared for byte order marks, such as an argument."""
    return [line.removesuffix("\r").removeprefix(_MARK) for line in text.split("\n")]


def words_of(text: str) -> str:
    """``text`` as questions are compared: white space at its ends counts for nothing, a run of it for one."""
    return " ".join(text.split())


def parse_json(text: str) -> Any:
    """The value of a JSON text, whose strings are all text.

    Raises:
        ValueError: It is not JSON, nests too deeply, or escapes half of a surrogate pair.
    """
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it nests too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("it has half of a surrogate pair, which is no character") from None
    return value


def is_text(argument: str) -> bool:
    """Whether an argument of the command line is text: bytes that are not come as surrogates."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in argument


def _decoded(lines: Iterable[bytes], only_text: bool = False) -> Iterator[str]:
    # No byte of a longer character in UTF-8 is a newline, so that bytes may be cut there.
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode()
            if (at := line.find(b"\0")) >= 0:
                raise UnicodeDecodeError("utf-8", line, at, at + 1, _NUL)
        except UnicodeDecodeError as error:
            if only_text:
                continue
            error.reason = f"{error.reason} in line {number}"
            raise
        # Files that were put together have a mark where each of them began.
        yield text.removesuffix("\n").removesuffix("\r").removeprefix(_MARK)
