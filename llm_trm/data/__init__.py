"""Problems, language-model states, and the files that store them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_trm.data.generation import ThinkingDataGenerator

__all__ = ["ThinkingDataGenerator"]


def __getattr__(name: str) -> Any:
    # The module imports torch, which `llm-trm data arithmetic` does not need.
    if name == "ThinkingDataGenerator":
        from llm_trm.data.generation import ThinkingDataGenerator

        return ThinkingDataGenerator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
