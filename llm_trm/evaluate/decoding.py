"""How a language model writes its answers. Imports no torch, so that help is quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from llm_trm.ranges import LENGTH, NO_OR_COUNT, NO_OR_SPREAD
from llm_trm.settings import Settings, setting
from llm_trm.shared_settings import top_p

#: ``no-think``: the plain language model answers at once. ``think``: it writes its thinking first.
#: ``latent``: the trained model recurs at ``<think>`` instead.
Mode = Literal["no-think", "think", "latent"]
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True)
class Decoding(Settings):
    """How tokens are chosen.

    Raises:
        InputError: A value out of range.
    """

    max_new_tokens: int = setting(2048, "Maximum number of tokens per answer, including thinking.", LENGTH)
    temperature: float = setting(
        0.0, "Sampling temperature; 0 always takes the most likely token.", NO_OR_SPREAD
    )
    top_p: float = top_p()
    top_k: int = setting(0, "Sample from this number of most likely tokens; 0 samples from all.", NO_OR_COUNT)
