"""Loads what ``llm-trm train puzzle`` and ``llm-trm import official`` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm_trm.models.puzzle.paper import PuzzleTRM, load_puzzle_model
from llm_trm.models.run_folder import INDEX_FILE, best_checkpoint

_REMEDY = "name a folder that `llm-trm train puzzle` or `llm-trm import official` wrote"


def load_puzzle(folder: Path, *, backend: str | None = None) -> tuple[PuzzleTRM, dict[str, Any]]:
    """A model in eval mode, and what is known of it.

    Args:
        folder: The output of a run, of which the best checkpoint is taken, a single checkpoint, or an
            imported model.
        backend: As for :class:`~trm_kernels.TinyRecursiveNetwork`.

    Returns:
        The model with its averaged weights, and facts, among them ``task``, ``rows`` and ``columns`` of its
        puzzles.

    Raises:
        InputError: A missing or broken file.
    """
    if (folder / INDEX_FILE).exists():
        folder = best_checkpoint(folder, _REMEDY)
    return load_puzzle_model(folder, backend=backend)
