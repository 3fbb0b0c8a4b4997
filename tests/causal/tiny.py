"""Language models with a few thousand weights and a recursion."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llm_trm.models.causal import TRMForCausalLM

PAD, THINK, END_THINK = 0, 30, 31
KINDS = ("llama", "qwen2", "qwen3", "smollm3")
REASONERS = ("latents", "sequence")


def tiny_decoder(kind: str = "llama", **settings: Any) -> PreTrainedModel:
    """A random decoder of one of KINDS with 32 tokens, two layers and grouped queries."""
    sizes: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
        # Large weights, because with the default of 0.02 a random model hardly depends on its context.
        "initializer_range": 0.3,
    }
    config = AutoConfig.for_model(kind, **{**sizes, **settings})
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config).eval()


def tiny_trm(kind: str = "llama", reasoner: str = "latents", **settings: Any) -> TRMForCausalLM:
    """A tiny decoder with a reasoner of three soft tokens, in eval mode."""
    decoder = settings.pop("decoder", None) or tiny_decoder(kind)
    sizes = {
        "num_latents": 3,
        "soft_tokens": 3,
        "d_compressed": 16,
        "n_layers": 1,
        "n_heads": 4,
        "compression_heads": 4,
        "n_latent_steps": 2,
        "n_deep_recursions": 2,
        "supervision_steps": 3,
        "think_token_id": THINK,
        "end_think_token_id": END_THINK,
    }
    torch.manual_seed(2)
    model = TRMForCausalLM.wrap(decoder, reasoner=reasoner, **{**sizes, **settings})
    # The scale of the decoder's states, so that soft tokens have an effect in every test.
    with torch.no_grad():
        model.model.reasoner.entry.projection.weight.mul_(3)
    return model.eval()


def padded(rows: list[list[int]], side: str = "right") -> tuple[Tensor, Tensor]:
    """Token ids and attention mask [B, L] of ``rows``."""
    longest = max(len(row) for row in rows)
    gaps = [[PAD] * (longest - len(row)) for row in rows]
    ids = [row + gap if side == "right" else gap + row for row, gap in zip(rows, gaps, strict=True)]
    mask = [
        [1] * len(row) + [0] * len(gap) if side == "right" else [0] * len(gap) + [1] * len(row)
        for row, gap in zip(rows, gaps, strict=True)
    ]
    return torch.tensor(ids), torch.tensor(mask)


#: With ``<think>`` in the middle, twice, first, last, and not at all.
ROWS = [
    [5, 6, 7, 8, THINK, 9, 10, 11],
    [12, 13, THINK, 14, 15, 16, THINK, 17, 18],
    [THINK, 19, 20],
    [21, 22, 23, 24, 25, THINK],
    [26, 27, 28, 29, 3, 4, 5, 6, 7, 8],
]
