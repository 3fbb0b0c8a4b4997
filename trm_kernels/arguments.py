"""Checks that numeric arguments have the right type, are finite and in range. They reject bools."""

from __future__ import annotations

import math
import numbers
from typing import Any


def integer(name: str, value: Any, minimum: int, maximum: int | None = None) -> None:
    """Raise ValueError unless ``value`` is a whole number from ``minimum`` to ``maximum``."""
    if not _is(value, numbers.Integral):
        raise ValueError(f"{name} must be a whole number, not {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, not {value}")
    if maximum is not None and value > maximum:
        raise ValueError(f"{name} must be at most {maximum}, not {value}")


def real(name: str, value: Any, *, positive: bool = False) -> None:
    """Raise ValueError unless ``value`` is finite and at least 0, or greater than 0 if ``positive``."""
    if not _is(value, numbers.Real):
        raise ValueError(f"{name} must be a number, not {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, not {value}")
    if value < 0.0 or (positive and value == 0.0):
        raise ValueError(f"{name} must {'be positive' if positive else 'not be negative'}, got {value}")


def fraction(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is a number in [0, 1)."""
    if not _is(value, numbers.Real) or not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be in [0, 1), not {value!r}")


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
