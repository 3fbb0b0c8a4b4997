"""Checks a language model's configuration, its values and memory, before the model is built."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llm_trm.errors import InputError
from llm_trm.files import read_object
from llm_trm.memory import require_memory
from llm_trm.ranges import (
    AMOUNT,
    FINITE,
    LAYERS,
    LENGTH,
    PLACE,
    SHARE,
    VOCABULARY,
    WIDTH,
    Range,
    Whole,
    require_in,
    shown,
)
from llm_trm.weights import RESTORE

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: Ranges of sizes, by their usual names and the names in older models.
_SIZES: dict[str, Range] = {
    "vocab_size": VOCABULARY,
    **dict.fromkeys(("hidden_size", "n_embd", "intermediate_size", "n_inner", "head_dim"), WIDTH),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_key_value_heads"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers"), LAYERS),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), LENGTH),
}
_SHARES = ("_eps", "_epsilon", "dropout", "_pdrop")
_FLAGS = ("use_cache", "output_attentions", "output_hidden_states", "return_dict", "tie_word_embeddings")
#: Ids of tokens; older models have -1 where they mean none.
_TOKENS, _TOKEN = ("bos_token_id", "eos_token_id", "pad_token_id"), Whole(-1, VOCABULARY.most)
#: Settings of generation_config.json that transformers calculates with.
_DECODING: dict[str, Range] = {
    **dict.fromkeys(("max_length", "max_new_tokens", "min_length", "min_new_tokens"), PLACE),
    **dict.fromkeys(("num_beams", "num_return_sequences", "no_repeat_ngram_size"), PLACE),
    "top_k": Whole(-1, PLACE.most),  # -1 means all tokens in other libraries
    **dict.fromkeys(("temperature", "top_p", "min_p", "typical_p", "repetition_penalty"), AMOUNT),
    "length_penalty": FINITE,
}


def require_valid_values(described: dict[str, Any], where: str) -> None:
    """Raise InputError, starting with ``where``, if a value in a model's ``config.json`` is invalid.

    Sizes must be integers in range, epsilons and dropouts must be in [0, 1], ids of tokens must be integers,
    some settings must be true or false, and all values must be finite.
    The check comes before transformers creates a config object, which may loop over the number of layers.

    Args:
        described: Content of the file.
    """
    for name, value in described.items():
        if isinstance(value, dict) and name not in (*_SIZES, *_FLAGS, *_TOKENS):
            require_valid_values(value, f"{where}{name}: ")
        elif name in _FLAGS or name in _TOKENS:
            _require_shared(name, value, where)
        elif value is None or isinstance(value, list):  # models whose layers differ have lists
            continue
        elif name in _SIZES:
            require_in(_SIZES[name], name, value, InputError, where)
        elif name.endswith(_SHARES):
            require_in(SHARE, name, value, InputError, where)
        elif isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{where}{name} must be finite, not {shown(value)}")


def require_valid_decoding(path: Path) -> None:
    """Raise InputError if a setting in a model's ``generation_config.json`` has the wrong type or no sense.

    Args:
        path: The file, which may be missing.
    """
    described = read_object(path, RESTORE, optional=True)
    for name, value in described.items():
        if name in _DECODING and value is not None:
            require_in(_DECODING[name], name, value, InputError, f"{path}: ")
        else:
            _require_shared(name, value, f"{path}: ")


def _require_shared(name: str, value: Any, where: str) -> None:
    """Check a setting that config.json and generation_config.json share."""
    if name in _FLAGS and not isinstance(value, bool | None):
        raise InputError(f"{where}{name} must be true or false, not {shown(value)}")
    if name in _TOKENS and value is not None:
        for token in value if isinstance(value, list) else [value]:
            require_in(_TOKEN, name, token, InputError, where)


def require_buildable(
    name: str, config: PretrainedConfig, dtype: torch.dtype | None, *, trust_remote_code: bool
) -> None:
    """Raise InputError if the language model that ``config`` describes cannot fit into memory.

    Args:
        name: The name that the user knows it by.
        dtype: Dtype of the weights; None assumes two bytes per parameter.
        trust_remote_code: Whether the model's own code may run.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size = 2 if dtype is None else dtype.itemsize
    require_memory(parameters * size, f"model {name} ({parameters:,} parameters)", "choose a smaller model")
