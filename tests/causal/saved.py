"""Models around the arithmetic model, saved as by ``llm-trm train lora``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llm_trm.models.causal import create_smollm_trm_model
from llm_trm.models.causal.loading import save_latent_model

_SIZES = {
    "reasoner": "sequence",
    "d_compressed": 16,
    "n_layers": 1,
    "n_heads": 4,
    "n_latent_steps": 1,
    "n_deep_recursions": 1,
    "supervision_steps": 3,
}


def latent_model(**settings: Any) -> Any:
    """A model with adapters that have a small effect; it still starts with ``<think>``."""
    torch.manual_seed(3)
    model = create_smollm_trm_model("arithmetic", True, 4, trm_kwargs={**_SIZES, **settings}, device="cpu")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.02)
            if "modules_to_save" in name and "entry.projection" in name:
                weight.mul_(0.3)
    return model.eval()


def save(model: Any, folder: Path, **facts: Any) -> Path:
    """Save ``model`` as training does."""
    save_latent_model(model, model.tokenizer, folder, base="arithmetic", prompt_form="chat", **facts)
    return folder
