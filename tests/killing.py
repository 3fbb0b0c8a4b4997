"""Runs in separate processes that are killed at random moments and resumed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any


def finished(processes: list[BaseProcess]) -> list[int | None]:
    """Return the exit codes of ``processes`` after at most four minutes."""
    for process in processes:
        process.join(timeout=240)
        process.kill()
    return [process.exitcode for process in processes]


def check_kills(
    start: Callable[[Path], BaseProcess], content_of: Callable[[Path], Any], folder: Path, kills: int
) -> None:
    """Kill runs ``kills`` times, and check that resumed runs produce the same results as an undisturbed run.

    If a run finishes before its next kill, it is compared too and a new one starts, so that all kills happen
    at any machine speed.

    Args:
        start: Starts a run in a folder, or resumes the one there.
        content_of: Reads the results of a run.
        folder: Contains the runs.
    """
    assert finished([start(folder / "warm")]) == [0]  # starts the server, which imports torch
    started = time.monotonic()
    assert finished([start(folder / "undisturbed")]) == [0]
    duration = time.monotonic() - started
    undisturbed = content_of(folder / "undisturbed")

    chance = random.Random(0)
    killed = runs = 0
    process = start(folder / "0")
    while killed < kills:
        process.join(timeout=chance.uniform(0.0, 0.5 * duration))
        if process.exitcode is None:
            process.kill()
            process.join()
            killed += 1
        else:
            assert process.exitcode == 0
            assert content_of(folder / str(runs)) == undisturbed
            runs += 1
        process = start(folder / str(runs))
    assert finished([process]) == [0]
    assert content_of(folder / str(runs)) == undisturbed
