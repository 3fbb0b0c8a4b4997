"""Several files that are replaced together."""

from __future__ import annotations

import signal
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from llm_trm.files import publish, unfinished
from llm_trm.signals import STOPPING, handling


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
    asked: list[int] = []
    try:
        with handling(lambda number, _: asked.append(number), *STOPPING):
            yield
    finally:
        if asked:
            signal.raise_signal(asked[0])
