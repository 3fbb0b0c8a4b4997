"""What the models with a recursion return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from llm_trm.upstream import cache_name

#: The name of the cache that this transformers does not use, or no longer.
_OTHER_NAME = "past_key_values" if cache_name() == "cache" else "cache"


def _served(key: Any) -> Any:
    return cache_name() if isinstance(key, str) and key == _OTHER_NAME else key


class _CacheByBothNames:
    """Answers to ``cache`` and ``past_key_values`` on every transformers, without a warning."""

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(_served(key))  # type: ignore[misc]

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(_served(key), value)  # type: ignore[misc]

    def __contains__(self, key: object) -> bool:
        return super().__contains__(_served(key))  # type: ignore[misc]

    def get(self, key: Any, default: Any = None) -> Any:
        return super().get(_served(key), default)  # type: ignore[misc]

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(_served(name), value)


setattr(_CacheByBothNames, _OTHER_NAME, property(lambda self: getattr(self, cache_name())))


@dataclass
class TRMModelOutput(_CacheByBothNames, BaseModelOutputWithPast):
    """States of the length of ``input_ids``, and what is known of the recursions.

    Attributes:
        trm_steps: Supervision steps of each ``<think>``, int32 [B, rounds]; 0 for samples that have fewer.
            With its neighbours None where nobody thought.
        halt_logits: Halting logits at the last step, [B, rounds].
        reconstruction_error: Mean over recursions of the share of the context that the compressor lost.
    """

    trm_steps: Tensor | None = None
    halt_logits: Tensor | None = None
    reconstruction_error: Tensor | None = None


@dataclass
class TRMCausalLMOutput(_CacheByBothNames, CausalLMOutputWithPast):
    """Logits of the length of ``input_ids``; see :class:`TRMModelOutput` for the rest.

    Attributes:
        halting_loss: Loss of the halting head, which ``loss`` holds with its weight.
    """

    trm_steps: Tensor | None = None
    halt_logits: Tensor | None = None
    reconstruction_error: Tensor | None = None
    halting_loss: Tensor | None = None
