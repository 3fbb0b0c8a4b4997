"""A language model's configuration, looked at before the model is built: its numbers, and its memory."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from llm_trm.errors import InputError
from llm_trm.memory import require_memory
from llm_trm.ranges import LAYERS, LENGTH, SHARE, VOCABULARY, WIDTH, Range, require_in, shown

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: By the usual names and by those of older models.
_SIZES: dict[str, Range] = {
    "vocab_size": VOCABULARY,
    **dict.fromkeys(("hidden_size", "n_embd", "intermediate_size", "n_inner", "head_dim"), WIDTH),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_key_value_heads"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers"), LAYERS),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), LENGTH),
}
_SHARES = ("_eps", "_epsilon", "dropout", "_pdrop")


def require_numbers(described: dict[str, Any], where: str) -> None:
    """Raise InputError, led by ``where``, if a number in a model's ``config.json`` makes no sense.

    Sizes are whole numbers that a model can have, epsilons and dropouts lie in [0, 1], and nothing is NaN.
    The file is looked at before transformers makes an object of it, which may count to the number of layers.

    Args:
        described: What it holds.
    """
    for name, value in described.items():
        if isinstance(value, dict):
            require_numbers(value, f"{where}{name}: ")
        elif value is None or isinstance(value, list):  # lists are of models whose layers differ
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
    """Raise InputError if the language model that ``config`` describes surely fits no memory.

    Args:
        name: What the user calls it.
        dtype: Of its weights; None counts two bytes a number.
        trust_remote_code: Whether code of the model's own may run.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    size = 2 if dtype is None else dtype.itemsize
    require_memory(numbers * size, f"model {name} ({numbers:,} numbers)", "choose a smaller one")
