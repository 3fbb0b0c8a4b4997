"""Several files that are replaced together."""

from __future__ import annotations

import signal
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from llm_trm.files import publish, unfinished

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def publishing(folder: Path, last: str, stale: Collection[str] = ()) -> Iterator[Path]:
    """Yield a temporary folder whose files replace those of ``folder`` if the block ends without an error.

    The old files stay until all new ones are on the disk. Ctrl-C and SIGTERM wait while they are exchanged,
    which only renames files. Other files of ``folder`` are not touched.

    Args:
        last: The file that makes the others complete, such as an index: the old one is removed first, and
            the new one is moved last.
        stale: Files of the old content, which are removed unless new ones replace them.
    """
    with unfinished(folder, last) as temporary:
        yield temporary
        names = sorted(path.name for path in temporary.iterdir())
        with uninterrupted():
            (folder / last).unlink(missing_ok=True)
            for name in stale:
                if name not in names:
                    (folder / name).unlink(missing_ok=True)
            for name in sorted(names, key=lambda name: name == last):
                publish(temporary / name, folder / name)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C and SIGTERM take effect at the end of the block."""
    if threading.current_thread() is not threading.main_thread():  # others receive no signals
        yield
        return
    asked: list[int] = []

    def later(number: int, _: FrameType | None) -> None:
        asked.append(number)

    before = {number: signal.getsignal(number) for number in _SIGNALS}
    # A signal that is ignored stays so; None is a handler that Python did not set, and cannot restore.
    before = {number: old for number, old in before.items() if old not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, later)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
        if asked:
            signal.raise_signal(asked[0])
