"""What other packages call the same thing in the versions that are served."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from llm_trm.errors import InputError


@functools.cache
def cache_name() -> str:
    """What transformers calls a decoder's cache, among arguments and in outputs.

    ``"cache"`` from 5.24.0 on, which warns of the older name, and ``"past_key_values"`` before.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPast

    names = {field.name for field in dataclasses.fields(BaseModelOutputWithPast)}
    return "cache" if "cache" in names else "past_key_values"


def cache_of(output: Any) -> Any:
    """The cache in what transformers' models return, or None; from ``generate``, the dictionary."""
    return getattr(output, cache_name())


def either_cache(cache: Any, past_key_values: Any) -> Any:
    """The cache that a caller gave under one of its two names, or None.

    Raises:
        InputError: Under both.
    """
    if cache is not None and past_key_values is not None:
        raise InputError("cache and past_key_values are two names of one argument: give one of them")
    return past_key_values if cache is None else cache


def checkpointing_option() -> str:
    """The argument of ``TrainingArguments`` that asks for gradient checkpointing.

    ``"activation_checkpointing"`` where transformers has it, which warns of the older name.
    """
    from transformers import TrainingArguments

    renamed = "activation_checkpointing"
    return renamed if hasattr(TrainingArguments, renamed) else "gradient_checkpointing"
