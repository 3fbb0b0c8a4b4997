"""Models that solve puzzles by recursion."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_trm.models.puzzle.loading import load_puzzle as load_puzzle
    from llm_trm.models.puzzle.paper import PuzzleTRM as PuzzleTRM
    from llm_trm.models.puzzle.paper import PuzzleTRMConfig as PuzzleTRMConfig
    from llm_trm.models.puzzle.scratch_trm import TinyRecursiveModel as TinyRecursiveModel
    from llm_trm.models.puzzle.seed_trm import TRM as TRM
    from llm_trm.models.puzzle.seed_trm import create_trm_model as create_trm_model

_MODULES = {
    "PuzzleTRM": "paper",
    "PuzzleTRMConfig": "paper",
    "TRM": "seed_trm",
    "TinyRecursiveModel": "scratch_trm",
    "create_trm_model": "seed_trm",
    "load_puzzle": "loading",
}

__all__ = ["TRM", "PuzzleTRM", "PuzzleTRMConfig", "TinyRecursiveModel", "create_trm_model", "load_puzzle"]


def __getattr__(name: str) -> Any:
    """Import a model on first access, so that importing other modules of this package stays fast."""
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
