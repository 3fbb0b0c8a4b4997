"""Names that differ between the supported versions of other packages."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from llm_trm.errors import InputError


@functools.cache
def cache_name() -> str:
    """The name of a decoder's cache in the arguments and outputs of transformers' models.

    ``"cache"`` since 5.24.0, which deprecates the older name ``"past_key_values"``.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPast

    names = {field.name for field in dataclasses.fields(BaseModelOutputWithPast)}
    return "cache" if "cache" in names else "past_key_values"


def cache_of(output: Any) -> Any:
    """The cache in the output of a transformers model or of ``generate`` (a dictionary), or None."""
    return getattr(output, cache_name())


def either_cache(cache: Any, past_key_values: Any) -> Any:
    """The cache that a caller passed under either of its two names, or None.

    Raises:
        InputError: The caller passed both.
    """
    if cache is not None and past_key_values is not None:
        raise InputError("cache and past_key_values are the same argument: pass only one of them")
    return past_key_values if cache is None else cache


def checkpointing_option() -> str:
    """The argument of ``TrainingArguments`` that enables gradient checkpointing.

    ``"activation_checkpointing"`` if transformers has it, since it then deprecates the older name.
    """
    from transformers import TrainingArguments

    renamed = "activation_checkpointing"
    return renamed if hasattr(TrainingArguments, renamed) else "gradient_checkpointing"
