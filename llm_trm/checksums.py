"""Checksums of files, and checks against those that an index recorded."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

from llm_trm.errors import InputError


def file_digest(path: Path) -> str:
    """SHA-256 of the content of a file, in hexadecimal; about 2 GB/s on a processor with SHA extensions."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_unchanged(path: Path, digest: Any) -> bool:
    """Whether a file has the content that an index recorded.

    A process reads an unchanged file for this only once, unless its size or time changes: files of data are
    read in every epoch.

    Args:
        digest: The entry of the index, from :func:`file_digest`; None if the index, from an older version,
            has none, so that any content passes.
    """
    if digest is None:
        return True
    if not isinstance(digest, str):
        return False
    about = path.stat()
    try:
        _require(path.resolve(), about.st_ino, about.st_size, about.st_mtime_ns, digest)
    except _Changed:
        return False
    return True


def require_unchanged(path: Path, digest: Any, remedy: str) -> None:
    """Raise InputError, ending in ``remedy``, unless :func:`is_unchanged`."""
    if digest is not None and not isinstance(digest, str):
        raise InputError(f"the checksum of {path} is not text: {remedy}")
    if not is_unchanged(path, digest):
        raise InputError(f"{path} has changed since it was written (its checksum differs): {remedy}")


class _Changed(Exception):
    """lru_cache keeps no errors, so that a file that was damaged and is restored is read again."""


@lru_cache(maxsize=1 << 16)
def _require(path: Path, _inode: int, _size: int, _time: int, digest: str) -> None:
    if file_digest(path) != digest:
        raise _Changed
