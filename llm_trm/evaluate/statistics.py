"""Shares with their uncertainty, and groups of records by what they say of a field."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

#: A field that problems of the arithmetic world have though their records do not spell it out.
OPERATIONS = "operations"

_CHAIN = re.compile(r"\d+([+*-]\d+)+")
#: A field with more distinct numbers is grouped by quartiles.
_MOST_GROUPS = 10


def wilson(successes: int, total: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval of a share, by default of 95% coverage; (0, 1) of nothing.

    Source: E. B. Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927.
    """
    if total == 0:
        return 0.0, 1.0
    share = successes / total
    centre = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def value_of(record: Mapping[str, Any], by: str) -> Any:
    """What a record says of the field ``by``; None if it does not.

    ``"operations"`` are counted in the problems of the arithmetic world.
    """
    if by == OPERATIONS and record.get(by) is None:
        problem = str(record.get("problem", ""))
        return len(re.findall(r"[+*-]", problem)) if _CHAIN.fullmatch(problem) else None
    return record.get(by)


def group_labels(values: Sequence[Any]) -> list[str]:
    """A label for each value; many different numbers share the labels of their quartiles."""
    numbers = sorted(value for value in values if isinstance(value, (int, float)))
    if len(set(numbers)) <= _MOST_GROUPS:
        return ["unknown" if value is None else str(value) for value in values]
    # A quartile ends at its last value, so that equal values are never parted.
    ends = sorted({numbers[math.ceil(len(numbers) * quarter / 4) - 1] for quarter in range(1, 5)})
    begins = [numbers[0], *(next(n for n in numbers if n > end) for end in ends[:-1])]

    def label(value: Any) -> str:
        if not isinstance(value, (int, float)):
            return "unknown"
        place = next(i for i, end in enumerate(ends) if value <= end)
        begin, end = begins[place], ends[place]
        return f"{begin:g}" if begin == end else f"{begin:g} to {end:g}"

    return [label(value) for value in values]
