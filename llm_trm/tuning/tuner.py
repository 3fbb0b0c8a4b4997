"""The main loop of ``llm-trm tune``: times candidates and writes the table after each problem."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llm_trm.benchmark.environment import commit, versions
from llm_trm.tuning.calls import RecordedCall
from llm_trm.tuning.candidates import candidates
from llm_trm.tuning.compiling import Compiler
from llm_trm.tuning.timing import Measure
from trm_kernels.ops import dispatch
from trm_kernels.ops._launch import Target
from trm_kernels.ops.dispatch import Entry, Table
from trm_kernels.ops.fingerprint import fingerprint
from trm_kernels.ops.tiles import heuristic


@dataclass(frozen=True)
class Tuned:
    """Result of one problem.

    Attributes:
        name: Key of the problem in the table.
        entry: The new entry, or None.
        tried: Number of timed candidates.
        dropped: Number of candidates that were excluded before timing or failed.
        reason: Why there is no entry, or an empty string.
    """

    name: str
    entry: Entry | None
    tried: int
    dropped: int
    reason: str = ""


def this_run() -> dict[str, Any]:
    """Metadata of the current run for the table's header."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(),
    }


def open_table(path: Path, target: Target) -> Table:
    """Read the table at ``path`` to continue it, or create a new one.

    Raises:
        TableError: The file is not a table of this device; it is not overwritten.
    """
    if path.exists():
        return dispatch.read(path, target)
    names = ("name", "kind", "arch", "processors", "shared_memory")
    return Table({name: getattr(target, name) for name in names})


def pending(calls: Sequence[RecordedCall], table: Table) -> list[RecordedCall]:
    """The calls whose entries in the table are missing or stale."""
    entries = table.entries
    return [
        call for call in calls if (entry := entries.get(dispatch.key(call.problem))) is None or entry.stale
    ]


def tune(
    calls: Sequence[RecordedCall],
    target: Target,
    table: Table,
    path: Path,
    compile_all: Compiler,
    measure: Measure,
    run: dict[str, Any],
    *,
    budget: float,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Tuned]:
    """Measure the calls and write the table after each, until ``budget`` seconds are spent.

    Args:
        calls: One call per problem.
        table: The table of earlier measurements; updated in place.
        path: Output file of the table.
        run: Metadata of this run for the table's header (:func:`this_run`).
        budget: Time in seconds after which no new problem starts.
    """
    start = clock()
    for call in calls:
        if clock() - start >= budget:
            return
        name = dispatch.key(call.problem)
        found = candidates(call.problem, target)
        refused = compile_all(call, found, target)
        accepted = [choice for choice, reason in zip(found, refused, strict=True) if reason is None]
        if not accepted:
            yield Tuned(name, None, 0, len(found), str(refused[0]))
            continue
        times = measure(call, accepted)
        if not times.ms:
            yield Tuned(name, None, 0, len(found), next(iter(times.failures.values())))
            continue
        best = min(times.ms, key=lambda choice: times.ms[choice])
        entry = Entry(
            best,
            times.ms[best],
            times.ms.get(heuristic(call.problem, target)),
            call.problem,
            fingerprint(call.problem.kernel),
            run["versions"].get("triton"),
        )
        table.entries[name] = entry
        table.run = run
        table.write(path)
        yield Tuned(name, entry, len(times.ms), len(found) - len(times.ms))
