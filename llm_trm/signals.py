"""Handlers of signals for the time of a block."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

#: Ctrl-C, and what ends a process by default.
STOPPING = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def handling(handler: Callable[[int, FrameType | None], None], *numbers: int) -> Iterator[None]:
    """Call ``handler`` when a signal arrives, until the block ends.

    A signal that the process was started to ignore, as in a background job of a script, stays ignored. Only
    the main thread can set handlers, so that nothing changes in another one.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            # None is a handler that Python did not set, and cannot restore.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
