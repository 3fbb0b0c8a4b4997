"""Trainers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_trm.train.phase2 import TRMSequenceTrainer as TRMSequenceTrainer

__all__ = ["TRMSequenceTrainer"]


def __getattr__(name: str) -> Any:
    """Import the trainer when it is asked for: the other modules of this package should not wait for it."""
    if name == "TRMSequenceTrainer":
        from llm_trm.train.phase2 import TRMSequenceTrainer

        return TRMSequenceTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
