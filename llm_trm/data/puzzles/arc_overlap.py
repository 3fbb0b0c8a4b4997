"""ARC tasks by what they hold: one that is held out must not be learned under another name.

Pairs are compared as they are: a task that another one becomes by turning and recolouring it is another task,
as for the authors of ARC.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from llm_trm.data.puzzles.arc import ArcTask, Pair


def learnable(
    tested: Sequence[ArcTask], learned: Sequence[ArcTask]
) -> tuple[list[ArcTask], list[tuple[str, str]]]:
    """The tasks of ``learned`` that are none of ``tested``.

    A task is one of them if it holds a test pair of it, the question alone where the answer is not known, or
    has the same demonstrations.

    Returns:
        These tasks, and the names of each other one and of the tested task that it is.
    """
    demonstrations = {frozenset(map(_form, task.train)): task.name for task in tested}
    tests = _tests(tested)
    kept, held_out = [], []
    for task in learned:
        known = [pair for pair in task.train + task.test if pair.output is not None]
        twin = next((name for pair in known for name in _tested_as(pair, tests)), None)
        twin = twin or demonstrations.get(frozenset(map(_form, task.train)))
        if twin is None:
            kept.append(task)
        else:
            held_out.append((task.name, twin))
    return kept, held_out


def without_tests(tested: Sequence[ArcTask]) -> tuple[list[ArcTask], list[tuple[str, str]]]:
    """``tested`` without the demonstrations that are test pairs, of another task among them or their own.

    Returns:
        The tasks, and of each demonstration that is gone the names of its task and of the one that it tests.
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


#: Names of tasks by the forms of their test pairs, and, where answers are not known, of their questions.
_Tests = tuple[Mapping[bytes, list[str]], Mapping[bytes, list[str]]]


def _tests(tasks: Sequence[ArcTask]) -> _Tests:
    answered: dict[bytes, list[str]] = {}
    open_: dict[bytes, list[str]] = {}
    for task in tasks:
        for pair in task.test:
            (open_ if pair.output is None else answered).setdefault(_form(pair), []).append(task.name)
    return answered, open_


def _tested_as(pair: Pair, tests: _Tests) -> list[str]:
    """The tasks that ``pair``, whose answer is known, is a test of."""
    answered, open_ = tests
    found = answered.get(_form(pair), [])
    return found + open_.get(_form(Pair(pair.input, None)), []) if open_ else found


def _form(pair: Pair) -> bytes:
    """What is the same for equal pairs, and for no others."""
    grids = [grid for grid in (pair.input, pair.output) if grid is not None]
    return bytes(side for grid in grids for side in grid.shape) + b"".join(grid.tobytes() for grid in grids)
