"""A file of answers that neither an interruption nor a killed process loses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import RawIOBase
from pathlib import Path

from llm_trm.errors import InputError
from llm_trm.files import is_special, publish, write_all
from llm_trm.publishing import uninterrupted

#: Ends the name of the file while it is written.
PARTIAL = ".partial"


class AnswersFile:
    """Takes answers line by line.

    Attributes:
        count: Number of complete lines.
        size: Bytes of the complete lines.
    """

    def __init__(self, path: Path, file: RawIOBase) -> None:
        self._path, self._file = path, file
        self.count = self.size = 0

    def add(self, line: str) -> None:
        """Write a line, which has no line ending yet."""
        content = line.encode() + b"\n"
        write_all(self._file, content, self._path)
        self.count += 1
        self.size += len(content)


def require_no_partial(path: Path, *, overwrite: bool) -> Path:
    """The file in which :func:`answers_file` writes what will be ``path``.

    Raises:
        InputError: It exists, from a run that goes on or was killed, unless ``overwrite``.
    """
    target = path.resolve()
    partial = target.with_name(target.name + PARTIAL)
    if partial.exists() and not overwrite:
        raise InputError(
            f"{partial} has the answers of a run that goes on or was killed: rename it, or replace it with "
            "--overwrite"
        )
    return partial


@contextmanager
def answers_file(path: Path, *, overwrite: bool) -> Iterator[AnswersFile]:
    """A file of answers, written as ``path`` with the suffix .partial and renamed at the end of the block.

    An error or an interruption keeps the complete answers before it, under the name ``path``. Without a
    complete answer, ``path`` stays as it is. What is no regular file, such as ``/dev/stdout``, is written
    directly. Temporary folders, as for other files, would be removed by the next run in the same folder.

    Raises:
        InputError: See :func:`require_no_partial`.
    """
    if is_special(path):
        with path.open("wb", buffering=0) as file:
            yield AnswersFile(path, file)
        return
    target = path.resolve()
    partial = require_no_partial(path, overwrite=overwrite)
    if overwrite:
        partial.unlink(missing_ok=True)
    # Without a buffer: it would try to write again what a full disk has refused.
    with partial.open("xb", buffering=0) as file:
        answers = AnswersFile(path, file)
        try:
            yield answers
        finally:
            with uninterrupted():
                if answers.count:
                    file.truncate(answers.size)
                    publish(partial, target)
                else:
                    partial.unlink(missing_ok=True)
