"""A small, untrained language model that still opens and closes its thinking now and then."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llm_trm.data.tags import END_THINK, THINK
from llm_trm.models import tiny
from llm_trm.models.tiny import END, tiny_language_model, tiny_tokenizer

#: The last of four layers has no positional encoding, as in SmolLM3.
PRESET = {
    **tiny.PRESETS["tiny"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
}


def save_tiny_model(folder: Path, *, likelier_tags: float = 3.0) -> Path:
    """Write the model and its tokenizer to ``folder``. Its logits depend on the text and are not near 0.

    Args:
        likelier_tags: Scale of the embeddings of the tags and the end token relative to other tokens. They
            are also the output head, so half of the positions favour such a token.
    """
    tokenizer = tiny_tokenizer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.PRESETS, "test", PRESET)
        model = tiny_language_model(tokenizer, "test")
    special = tokenizer.convert_tokens_to_ids([THINK, END_THINK, END])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(10)
        model.get_input_embeddings().weight[special] *= likelier_tags
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
