"""Where a run's own tables of tiles lie."""

from __future__ import annotations

from pathlib import Path


def tables(out: Path) -> Path:
    """The folder among the results; children read tables from there (``TRM_TABLES``)."""
    return out / "tables"
