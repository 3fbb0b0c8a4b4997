"""Results of a case: what tables and plots are drawn from, and what a results file holds a line of."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llm_trm.benchmark.suites import Group
from llm_trm.benchmark.workloads import Case
from llm_trm.text import read_lines

#: Candidates that others are compared with, where they ran.
BASELINES = ("original", "eager", "compile", "eager+graph", "compile+graph", "official+compile")


@dataclass
class Row:
    """One candidate at one case. Figures that were not taken, or are withheld, are None.

    Attributes:
        status: ``ok``, ``wrong`` (breaks the tolerance rule: its speed is withheld), ``not run`` (cannot
            serve the case here), ``skipped`` (no time left) or ``failed`` (raised an error).
        reason: Why the status is not ``ok``.
        median_ms, p20_ms, p80_ms: Milliseconds a call.
        rounds: Samples behind them.
        tflops: 1e12 operations a second.
        share: Time of the measured limit over the median, 1 being the limit.
        peak_bytes: Peak memory above parameters and inputs.
        errors: Relative Frobenius error against float64 of ``output`` and, in training, ``gradients``;
            None where it is not finite.
        speedup: Median of each baseline over this row's median.
        differs: What the candidate computes instead of the case's function; nothing holds it to the
            tolerance rule then.
        flops: Operations of a call, where they are not the case's own.
        coarser: Why it may err more than the tolerance rule allows; its error stands beside its speed.
    """

    backend: str
    status: str
    reason: str | None = None
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    rounds: int = 0
    tflops: float | None = None
    share: float | None = None
    peak_bytes: int | None = None
    errors: dict[str, float | None] = field(default_factory=dict)
    speedup: dict[str, float] = field(default_factory=dict)
    differs: str | None = None
    flops: int | None = None
    coarser: str | None = None


@dataclass
class CaseResult:
    """All rows of a case, and the limit that they are held against.

    Attributes:
        device: Name of the device, as in ``NVIDIA H200``.
        floor_ms: Milliseconds that the measured limits allow at best.
        matmul_tflops: Measured rate of the big matrix product, 1e12 operations a second.
        copy_gbps: Measured rate of the big copy, 1e9 bytes read or written a second.
        group: Which rows it has; a case may be measured once for each group.
    """

    case: Case
    device: str
    floor_ms: float
    matmul_tflops: float
    copy_gbps: float
    rows: list[Row]
    group: Group = "main"

    @property
    def key(self) -> str:
        """Identifies what was measured: of two results with one key the later counts."""
        return key_of(self.case, self.group)

    def baselines(self) -> list[str]:
        """The baselines that were timed."""
        timed = {row.backend for row in self.rows if row.median_ms is not None}
        return [name for name in BASELINES if name in timed]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"name": self.key}

    @classmethod
    def from_json(cls, line: dict[str, Any]) -> CaseResult:
        """The inverse of :meth:`to_json`, run details aside."""
        fields = {key: line[key] for key in ("device", "floor_ms", "matmul_tflops", "copy_gbps")}
        rows = [Row(**row) for row in line["rows"]]
        return cls(Case(**line["case"]), rows=rows, group=line.get("group", "main"), **fields)


def key_of(case: Case, group: Group) -> str:
    """:attr:`CaseResult.key` of a case measured with the rows of ``group``."""
    return case.name if group == "main" else f"{group}: {case.name}"


def add_speedups(rows: Iterable[Row]) -> None:
    """Fill in the ratios of every timed row to the baselines that were timed."""
    medians = {row.backend: row.median_ms for row in rows if row.median_ms is not None}
    for row in rows:
        if row.median_ms is not None:
            row.speedup = {
                name: medians[name] / row.median_ms
                for name in BASELINES
                if name in medians and name != row.backend
            }


def append(path: Path, line: dict[str, Any]) -> None:
    """Append one line to a results file, on a line of its own even after a run that was cut short."""
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(line, allow_nan=False).encode() + b"\n")


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a results file; a last line that was cut short is left out."""
    if not path.exists():
        return
    for text in read_lines(path, only_text=True):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        yield line
