"""Loads the output of ``llm-trm train puzzle`` and ``llm-trm import official``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm_trm.models.puzzle.paper import PuzzleTRM, load_puzzle_model
from llm_trm.models.run_folder import model_folder

_REMEDY = "name a folder that `llm-trm train puzzle` or `llm-trm import official` wrote"


def load_puzzle(folder: Path, *, backend: str | None = None) -> tuple[PuzzleTRM, dict[str, Any]]:
    """Load a model in eval mode, and its metadata.

    Args:
        folder: The output of a run, whose best checkpoint is loaded, a single checkpoint, or an imported
            model.
        backend: As for :class:`~trm_kernels.TinyRecursiveNetwork`.

    Returns:
        The model with averaged weights, and facts, which include ``task``, ``rows`` and ``columns`` of its
        puzzles.

    Raises:
        InputError: A file is missing or invalid.
    """
    folder = model_folder(folder, _REMEDY)
    return load_puzzle_model(folder, backend=backend)
