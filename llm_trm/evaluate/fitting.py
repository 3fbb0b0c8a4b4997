"""Checks which puzzles a model is built for."""

from __future__ import annotations

from typing import Any

from llm_trm.models.puzzle.paper import PuzzleTRM


def misfit(model: PuzzleTRM, facts: dict[str, Any], task: str, rows: int, columns: int) -> str | None:
    """Describe the puzzles that a model is built for, if they differ in kind or size from these; else None.

    Args:
        model: The model, which has a fixed number of cells.
        facts: Facts of its checkpoint. Imported checkpoints may lack ``task``, ``rows`` and ``columns``.
    """
    known, cells = facts.get("task") or task, model.config.seq_len
    sides = facts.get("rows") or rows, facts.get("columns") or columns
    if known == task and sides == (rows, columns) and cells == rows * columns:
        return None
    size = "x".join(map(str, sides)) if sides[0] * sides[1] == cells else f"{cells} cells"
    return f"{known} puzzles of {size}"
