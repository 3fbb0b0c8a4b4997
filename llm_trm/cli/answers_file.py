"""A file of answers that an interruption does not lose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import RawIOBase
from pathlib import Path

from llm_trm.files import publish, unfinished, write_all
from llm_trm.publishing import uninterrupted


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


@contextmanager
def answers_file(path: Path) -> Iterator[AnswersFile]:
    """A file of answers, written next to ``path`` and moved there at the end of the block.

    An error or an interruption keeps the complete answers before it, under the name ``path``. Without a
    complete answer, ``path`` stays as it is. What is no regular file, such as ``/dev/stdout``, is written
    directly.
    """
    target = path.resolve()
    if target.exists() and not target.is_file():
        with path.open("wb", buffering=0) as file:
            yield AnswersFile(path, file)
        return
    with unfinished(target.parent, target.name) as folder:
        temporary = folder / target.name
        # Without a buffer: it would try to write again what a full disk has refused.
        with temporary.open("wb", buffering=0) as file:
            answers = AnswersFile(path, file)
            try:
                yield answers
            finally:
                if answers.count:
                    with uninterrupted():
                        file.truncate(answers.size)
                        publish(temporary, target)
