"""Causal language models that recur in latent space at ``<think>``. Needs the extra ``train``."""

from __future__ import annotations

from llm_trm.extras import require

require("train", "transformers")

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM  # noqa: E402

from llm_trm.models.causal.cache import TRMCache  # noqa: E402
from llm_trm.models.causal.config import TRMConfig  # noqa: E402
from llm_trm.models.causal.creation import (  # noqa: E402
    LORA_TARGETS,
    add_lora,
    create_smollm_trm_model,
)
from llm_trm.models.causal.hidden_state import HiddenStateTRM  # noqa: E402
from llm_trm.models.causal.modeling import TRMForCausalLM, TRMModel  # noqa: E402
from llm_trm.models.causal.outputs import TRMCausalLMOutput, TRMModelOutput  # noqa: E402
from llm_trm.models.causal.tokens import add_think_tokens, think_ids  # noqa: E402
from llm_trm.models.compression import LatentAttentionCompressor  # noqa: E402

AutoConfig.register("trm", TRMConfig)
AutoModel.register(TRMConfig, TRMModel)
AutoModelForCausalLM.register(TRMConfig, TRMForCausalLM)

__all__ = [
    "LORA_TARGETS",
    "HiddenStateTRM",
    "LatentAttentionCompressor",
    "TRMCache",
    "TRMCausalLMOutput",
    "TRMConfig",
    "TRMForCausalLM",
    "TRMModel",
    "TRMModelOutput",
    "add_lora",
    "add_think_tokens",
    "create_smollm_trm_model",
    "think_ids",
]
