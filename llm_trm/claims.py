"""Only one process at a time writes a folder."""

from __future__ import annotations

import os
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llm_trm.errors import InputError
from llm_trm.files import naming, sweep, writable_folder

#: While a process writes a folder, it holds a lock on this file in it.
LOCK_FILE = ".llm-trm.lock"


@contextmanager
def claimed(folder: Path) -> Iterator[Path]:
    """Create ``folder``, and be the only process that writes in it until the block ends.

    The lock is the operating system's: it ends with its process, so that a killed run leaves none behind. At
    the start, temporary files of killed processes are removed. At the end, the folder is removed if it is
    still empty and did not exist before: a call that is refused should leave nothing.

    Of several processes of a launch, only the main one may claim the folder.

    Raises:
        InputError: Another process writes in the folder, or it is not writable.
    """
    from filelock import FileLock, Timeout

    created = _missing(folder)
    writable_folder(folder)
    path = folder / LOCK_FILE
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=0)
        while not path.exists():  # its last holder removed it after this process had opened it
            lock.release()
            lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"{folder} is in use by {_holder(path)}: wait until it ends, or choose another --output"
        ) from None
    try:
        holder = f"process {os.getpid()} on {socket.gethostname()} ({shlex.join(_command())})\n"
        with naming(path):
            path.write_text(holder, encoding="utf-8")
        sweep(folder)
        yield folder
    finally:
        with suppress(OSError):  # Windows removes no open file
            path.unlink()
        lock.release()
        with suppress(OSError):  # not empty
            for one in created:
                one.rmdir()


def _missing(folder: Path) -> list[Path]:
    """Those of ``folder`` and its parents that do not exist, the innermost first."""
    found = []
    for path in (folder, *folder.parents):
        if path.exists():
            break
        found.append(path)
    return found


def _command() -> list[str]:
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def _holder(path: Path) -> str:
    """Who holds the lock, from what it wrote into the file."""
    with suppress(OSError, UnicodeError):
        if text := path.read_text(encoding="utf-8").strip():
            return text[:200]
    return "another process"
