"""Compares ARC tasks by content, so that a held-out task is not learned under another name.

Pairs must be equal to match. A rotated or recoloured task is a different task, as in ARC itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from llm_trm.data.puzzles.arc import ArcTask, Pair


def learnable(
    tested: Sequence[ArcTask], learned: Sequence[ArcTask]
) -> tuple[list[ArcTask], list[tuple[str, str]]]:
    """The tasks of ``learned`` that do not duplicate a task of ``tested``.

    A task is a duplicate if it contains a test pair of the tested task (or its question, if the answer is
    unknown), or has the same demonstrations.

    Returns:
        These tasks, and for each duplicate its name and the name of the tested task.
    """
    demonstrations = {frozenset(map(_pair_key, task.train)): task.name for task in tested}
    tests = _tests(tested)
    kept, held_out = [], []
    for task in learned:
        known = [pair for pair in task.train + task.test if pair.output is not None]
        original = next((name for pair in known for name in _tested_as(pair, tests)), None)
        original = original or demonstrations.get(frozenset(map(_pair_key, task.train)))
        if original is None:
            kept.append(task)
        else:
            held_out.append((task.name, original))
    return kept, held_out


def without_tests(tested: Sequence[ArcTask]) -> tuple[list[ArcTask], list[tuple[str, str]]]:
    """``tested`` without demonstrations that are test pairs of the same or another tested task.

    Returns:
        The tasks, and for each removed demonstration the names of its task and of the task that it tests.
    """
    tests = _tests(tested)
    found, gone = [], []
    for task in tested:
        kept = []
        for pair in task.train:
            tested_by = _tested_as(pair, tests)
            if tested_by:
                other = next((name for name in tested_by if name != task.name), task.name)
                gone.append((task.name, other))
            else:
                kept.append(pair)
        found.append(replace(task, train=tuple(kept)) if len(kept) < len(task.train) else task)
    return found, gone


#: Names of tasks by key of their test pairs, and by key of their questions if the answers are unknown.
_Tests = tuple[Mapping[bytes, list[str]], Mapping[bytes, list[str]]]


def _tests(tasks: Sequence[ArcTask]) -> _Tests:
    answered: dict[bytes, list[str]] = {}
    open_: dict[bytes, list[str]] = {}
    for task in tasks:
        for pair in task.test:
            (open_ if pair.output is None else answered).setdefault(_pair_key(pair), []).append(task.name)
    return answered, open_


def _tested_as(pair: Pair, tests: _Tests) -> list[str]:
    """Names of the tasks that have ``pair``, whose answer is known, as a test pair."""
    answered, open_ = tests
    found = answered.get(_pair_key(pair), [])
    return found + open_.get(_pair_key(Pair(pair.input, None)), []) if open_ else found


def _pair_key(pair: Pair) -> bytes:
    """A key that is equal exactly for equal pairs."""
    grids = [grid for grid in (pair.input, pair.output) if grid is not None]
    return bytes(side for grid in grids for side in grid.shape) + b"".join(grid.tobytes() for grid in grids)
