"""Trainers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_trm.train.phase2.trainer import TRMSequenceTrainer as TRMSequenceTrainer
    from llm_trm.train.puzzle.scratch_trainer import TRMTrainer as TRMTrainer

_MODULES = {"TRMSequenceTrainer": "phase2.trainer", "TRMTrainer": "puzzle.scratch_trainer"}

__all__ = ["TRMSequenceTrainer", "TRMTrainer"]


def __getattr__(name: str) -> Any:
    """Import a trainer on first use, so that the other modules of this package load quickly."""
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
