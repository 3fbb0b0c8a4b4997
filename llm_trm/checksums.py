"""Checks files against the checksums that an index recorded."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from llm_trm.errors import InputError
from llm_trm.files import require_digest


def require_unchanged(path: Path, digest: Any, remedy: str) -> None:
    """Raise InputError unless a file has the content that an index recorded.

    A process reads the file for this only once, unless its size or time changes: files of data are read in
    every epoch.

    Args:
        digest: The entry of the index; None if the index, from an older version, has none.
        remedy: End of the message.
    """
    if digest is None:
        return
    if not isinstance(digest, str):
        raise InputError(f"the checksum of {path} is not text: {remedy}")
    about = path.stat()
    _require(path.resolve(), about.st_ino, about.st_size, about.st_mtime_ns, digest, remedy)


# lru_cache keeps no errors, so that a broken file is refused each time.
@lru_cache(maxsize=1 << 16)
def _require(path: Path, _inode: int, _size: int, _time: int, digest: str, remedy: str) -> None:
    require_digest(path, digest, remedy)
