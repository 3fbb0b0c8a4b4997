"""Outputs of the models with a recursion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from llm_trm.upstream import cache_name

#: The name of the cache that the installed transformers does not use.
_OTHER_NAME = "past_key_values" if cache_name() == "cache" else "cache"


def _current_name(key: Any) -> Any:
    return cache_name() if isinstance(key, str) and key == _OTHER_NAME else key


class _CacheByBothNames:
    """Supports both ``cache`` and ``past_key_values`` with every transformers version, without a warning."""

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(_current_name(key))  # type: ignore[misc]

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(_current_name(key), value)  # type: ignore[misc]

    def __contains__(self, key: object) -> bool:
        return super().__contains__(_current_name(key))  # type: ignore[misc]

    def get(self, key: Any, default: Any = None) -> Any:
        return super().get(_current_name(key), default)  # type: ignore[misc]

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(_current_name(name), value)


setattr(_CacheByBothNames, _OTHER_NAME, property(lambda self: getattr(self, cache_name())))


@dataclass
class TRMModelOutput(_CacheByBothNames, BaseModelOutputWithPast):
    """States with the length of ``input_ids``, and the outputs of the recursions.

    Attributes:
        trm_steps: Supervision steps of each ``<think>``, int32 [B, rounds]; 0 for samples with fewer
            rounds. This and the attributes below are None if no sample has a ``<think>``.
        halt_logits: Halting logits at the last step, [B, rounds].
        reconstruction_error: Fraction of the context that the compressor lost, averaged over recursions.
    """

    trm_steps: Tensor | None = None
    halt_logits: Tensor | None = None
    reconstruction_error: Tensor | None = None


@dataclass
class TRMCausalLMOutput(_CacheByBothNames, CausalLMOutputWithPast):
    """Logits with the length of ``input_ids``; see :class:`TRMModelOutput` for the rest.

    Attributes:
        halting_loss: Unweighted loss of the halting head; ``loss`` includes it with its weight.
    """

    trm_steps: Tensor | None = None
    halt_logits: Tensor | None = None
    reconstruction_error: Tensor | None = None
    halting_loss: Tensor | None = None
