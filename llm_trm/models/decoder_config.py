"""Checks a language model's configuration, its values and memory, before the model is built."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from llm_trm.errors import InputError
from llm_trm.memory import require_memory
from llm_trm.ranges import LAYERS, LENGTH, SHARE, VOCABULARY, WIDTH, Range, require_in, shown

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


def require_valid_values(described: dict[str, Any], where: str) -> None:
    """Raise InputError, starting with ``where``, if a value in a model's ``config.json`` is invalid.

    Sizes must be integers in range, epsilons and dropouts must be in [0, 1], and all values must be finite.
    The check comes before transformers creates a config object, which may loop over the number of layers.

    Args:
        described: Content of the file.
    """
    for name, value in described.items():
        if isinstance(value, dict):
            require_valid_values(value, f"{where}{name}: ")
        elif value is None or isinstance(value, list):  # models whose layers differ have lists
            continue
        elif name in _SIZES:
            require_in(_SIZES[name], name, value, InputError, where)
        elif name.endswith(_SHARES):
            require_in(SHARE, name, value, InputError, where)
        elif isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{where}{name} must be finite, not {shown(value)}")


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
