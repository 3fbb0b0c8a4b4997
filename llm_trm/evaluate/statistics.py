"""Confidence intervals of proportions, and grouping of records by a field."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

#: A field that is derived from problems of the arithmetic world if their records lack it.
OPERATIONS = "operations"

_CHAIN = re.compile(r"\d+([+*-]\d+)+")
#: A field with more distinct numbers than this is grouped by quartiles.
_MAX_GROUPS = 10


def wilson(successes: int, total: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson score interval of a proportion, by default with 95% coverage; (0, 1) if ``total`` is 0.

    Source: E. B. Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927.
    """
    if total == 0:
        return 0.0, 1.0
    proportion = successes / total
    centre = proportion + z * z / (2 * total)
    half = z * math.sqrt(proportion * (1 - proportion) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def value_of(record: Mapping[str, Any], by: str) -> Any:
    """The value of the field ``by`` in a record; None if missing.

    ``"operations"`` are counted in the problems of the arithmetic world.
    """
    if by == OPERATIONS and record.get(by) is None:
        problem = str(record.get("problem", ""))
        return len(re.findall(r"[+*-]", problem)) if _CHAIN.fullmatch(problem) else None
    return record.get(by)


def group_labels(values: Sequence[Any]) -> list[str]:
    """A label for each value. If there are many different numbers, the labels are quartiles."""
    numbers = sorted(value for value in values if isinstance(value, (int, float)))
    if len(set(numbers)) <= _MAX_GROUPS:
        return ["unknown" if value is None else str(value) for value in values]
    # A quartile ends at its last value, so that equal values are never separated.
    ends = sorted({numbers[math.ceil(len(numbers) * quarter / 4) - 1] for quarter in range(1, 5)})
    starts = [numbers[0], *(next(n for n in numbers if n > end) for end in ends[:-1])]

    def label(value: Any) -> str:
        if not isinstance(value, (int, float)):
            return "unknown"
        index = next(i for i, end in enumerate(ends) if value <= end)
        start, end = starts[index], ends[index]
        return f"{start:g}" if start == end else f"{start:g} to {end:g}"

    return [label(value) for value in values]
