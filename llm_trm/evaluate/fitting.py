"""Which puzzles a model was made for."""

from __future__ import annotations

from typing import Any

from llm_trm.models.puzzle.paper import PuzzleTRM


def misfit(model: PuzzleTRM, facts: dict[str, Any], task: str, rows: int, columns: int) -> str | None:
    """What else a model solves than puzzles of this kind and size, in words; None if it was made for them.

    Args:
        model: Knows its number of cells.
        facts: What its checkpoint says of it; may leave out ``task``, ``rows`` and ``columns``, as those of
            imported checkpoints can.
    """
    known, cells = facts.get("task") or task, model.config.seq_len
    sides = facts.get("rows") or rows, facts.get("columns") or columns
    if known == task and sides == (rows, columns) and cells == rows * columns:
        return None
    size = "x".join(map(str, sides)) if sides[0] * sides[1] == cells else f"{cells} cells"
    return f"{known} puzzles of {size}"
