"""Settings of a run, as they are written beside it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def as_json(settings: DataclassInstance) -> dict[str, Any]:
    """All settings as JSON values, by name."""
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()
    }
