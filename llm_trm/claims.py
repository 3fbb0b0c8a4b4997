"""Only one process at a time writes a folder."""

from __future__ import annotations

import errno
import logging
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from llm_trm.errors import InputError
from llm_trm.files import naming, sweep, writable_folder

if TYPE_CHECKING:
    from filelock import FileLock

#: While a process writes a folder, it holds a lock on this file in it.
LOCK_FILE = ".llm-trm.lock"

#: Errors of network file systems without locks.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_logger = logging.getLogger(__name__)


@contextmanager
def claimed(folder: Path, *, main: bool = True) -> Iterator[Path]:
    """Create ``folder``, and be the only process that writes in it until the block ends.

    The lock is the operating system's: it ends with its process, so that a killed run leaves none behind. At
    the start, temporary files of killed processes are removed. At the end, the folder is removed if it is
    still empty and did not exist before: a call that is refused should leave nothing. If the file system has
    no locks, a warning says so, and nothing is checked.

    Args:
        main: Whether this is the main process of its launch. The others write under its lock, and do nothing
            here.

    Raises:
        InputError: Another process writes in the folder, or it is not writable.
    """
    if not main:
        yield folder
        return
    created = _missing(folder)
    writable_folder(folder)
    path = folder / LOCK_FILE
    lock = _lock(path)
    try:
        holder = f"process {os.getpid()} on {socket.gethostname()} ({shlex.join(_command())})\n"
        with naming(path):
            path.write_text(holder, encoding="utf-8")
        if lock.is_locked:
            sweep(folder)
        yield folder
    finally:
        with suppress(OSError):  # Windows removes no open file
            path.unlink()
        lock.release()
        with suppress(OSError):  # not empty
            for one in created:
                one.rmdir()


def require_unclaimed(folder: Path) -> None:
    """Raise InputError if another process writes in ``folder``, which need not exist; nothing is created.

    Call it before reading what that process replaces and removes, for which its absence would be a fault.
    """
    path = folder / LOCK_FILE
    if path.exists():
        _lock(path).release()


def _lock(path: Path) -> FileLock:
    from filelock import FileLock, Timeout

    # Without locks, filelock would go by the existence of the file, which a killed run leaves behind.
    lock = FileLock(path, thread_local=False, fallback_to_soft=False)
    try:
        with naming(path):
            lock.acquire(timeout=0)
            while not path.exists():  # its last holder removed it after this process had opened it
                lock.release()
                lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"{path.parent} is in use by {_holder(path)}: wait until it ends, or choose another folder"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _logger.warning(
            "%s: its file system has no locks (%s): start no second process that writes in it",
            path.parent,
            error.strerror,
        )
    return lock


def _missing(folder: Path) -> list[Path]:
    """Those of ``folder`` and its parents that do not exist, the innermost first."""
    found = []
    for path in (folder, *folder.parents):
        if path.exists():
            break
        found.append(path)
    return found


def _command() -> list[str]:
    name = Path(sys.argv[0]).name
    return ["llm-trm" if name == "__main__.py" else name, *sys.argv[1:]]  # launchers run the module


def _holder(path: Path) -> str:
    """Who holds the lock, from what it wrote into the file."""
    with suppress(OSError, UnicodeError):
        if text := path.read_text(encoding="utf-8").strip():
            return text[:200]
    return "another process"
