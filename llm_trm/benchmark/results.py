"""Results of a case, which tables and plots show and results files store one per line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llm_trm.benchmark.suites import Group
from llm_trm.benchmark.workloads import Case
from llm_trm.errors import InputError, one_line
from llm_trm.files import write_all
from llm_trm.text import read_lines

#: Bytes of a line that are read to recognise a results file.
_LONGEST_LINE = 1 << 10
#: Candidates that others are compared with.
BASELINES = ("original", "eager", "compile", "eager+graph", "compile+graph", "official+compile")


@dataclass
class Row:
    """Result of one candidate for one case. Values that were not measured or are withheld are None.

    Attributes:
        status: ``ok``, ``wrong`` (violates the tolerance rule, so its speed is withheld), ``not run`` (does
            not support the case here), ``skipped`` (no time left) or ``failed`` (raised an error).
        reason: Why the status is not ``ok``.
        median_ms, p20_ms, p80_ms: Milliseconds per call.
        rounds: Number of samples.
        tflops: 1e12 operations per second.
        share: Time of the measured limit divided by the median; 1 is the limit.
        peak_bytes: Peak memory above parameters and inputs.
        errors: Relative Frobenius error against float64 of ``output`` and, in training, ``gradients``;
            None if it is not finite.
        speedup: Median of each baseline divided by this row's median.
        differs: What the candidate computes instead of the case's function. The tolerance rule then does
            not apply.
        flops: Operations per call, if they differ from the case's.
        coarser: Why it may exceed the tolerance rule; its error is shown with its speed.
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
    """All rows of a case, and the measured limits.

    Attributes:
        device: Name of the device, such as ``NVIDIA H200``.
        floor_ms: Lower bound of the time from the measured limits, in milliseconds.
        matmul_tflops: Measured rate of the large matrix product, 1e12 operations per second.
        copy_gbps: Measured rate of the large copy, 1e9 bytes read or written per second.
        group: The group of its rows; a case may be measured once per group.
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
        """Identifies the measurement. Of two results with the same key, the later one counts."""
        return key_of(self.case, self.group)

    def baselines(self) -> list[str]:
        """The baselines that were timed."""
        timed = {row.backend for row in self.rows if row.median_ms is not None}
        return [name for name in BASELINES if name in timed]

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON values."""
        return asdict(self) | {"name": self.key}

    @classmethod
    def from_json(cls, line: dict[str, Any]) -> CaseResult:
        """The inverse of :meth:`to_json`, ignoring metadata of the run.

        Raises:
            InputError: The line does not describe a case with its rows.
        """
        try:
            fields = {key: line[key] for key in ("device", "floor_ms", "matmul_tflops", "copy_gbps")}
            rows = [Row(**row) for row in line["rows"]]
            return cls(Case(**line["case"]), rows=rows, group=line.get("group", "main"), **fields)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"a result of {line.get('name')!r:.100} has no valid case and rows ({one_line(error)}): "
                "remove its line from the results file, and measure the case again"
            ) from error


def key_of(case: Case, group: Group) -> str:
    """:attr:`CaseResult.key` of a case measured with the rows of ``group``."""
    return case.name if group == "main" else f"{group}: {case.name}"


def add_speedups(rows: Iterable[Row]) -> None:
    """Set the speedups of all timed rows over the timed baselines."""
    medians = {row.backend: row.median_ms for row in rows if row.median_ms is not None}
    for row in rows:
        if row.median_ms is not None:
            row.speedup = {
                name: medians[name] / row.median_ms
                for name in BASELINES
                if name in medians and name != row.backend
            }


def append(path: Path, line: dict[str, Any]) -> None:
    """Append one line to a results file, starting a new line even after an interrupted write.

    Raises:
        OSError: The disk is full, for example; the file is as before.
    """
    with path.open("a+b", buffering=0) as file:
        content = json.dumps(line, allow_nan=False).encode() + b"\n"
        before = file.tell()
        if before:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                content = b"\n" + content
        try:
            write_all(file, content, path)
        except BaseException:
            file.truncate(before)
            raise


def require_results(path: Path, option: str) -> None:
    """Raise InputError if there is a file that is not one of results, to which nothing should be appended."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        first = file.readline(_LONGEST_LINE)
    # The first line may be incomplete, from an interrupted write.
    if first and not first.startswith(b"{"):
        raise InputError(f"{path} is not a file of results: choose another {option}")


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a results file, skipping incomplete ones from an interrupted write.

    Raises:
        InputError: The file cannot be read.
    """
    if not path.exists():
        return
    try:
        for text in read_lines(path, only_text=True):
            try:
                line = json.loads(text, parse_constant=_finite, parse_float=_finite)
            except (ValueError, RecursionError):
                continue
            if isinstance(line, dict):
                yield line
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): name a file of results") from error


def _finite(text: str) -> float:
    """The number; ValueError for NaN and infinity, which :func:`append` does not write, and 1e400."""
    if not math.isfinite(number := float(text)):
        raise ValueError(text)
    return number
