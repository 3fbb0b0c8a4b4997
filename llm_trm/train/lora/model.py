"""The model that ``llm-trm train lora`` trains: a language model, a reasoner, adapters, new tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_trm.choices import PromptForm
from llm_trm.data.lessons import prompt_form
from llm_trm.errors import InputError
from llm_trm.extras import require
from llm_trm.models.causal import TRMForCausalLM, add_lora, add_think_tokens, think_ids
from llm_trm.models.causal.creation import train_reasoner
from llm_trm.models.causal.loading import ADAPTERS_FILE
from llm_trm.models.causal.starting import require_width, start_from_phase2
from llm_trm.models.loading import language_model_source, pretrained, require_padding
from llm_trm.train.lora.config import LoraTrainingConfig

#: A language model with narrower states is a toy, and gets a small reasoner.
_TOY_WIDTH = 512


@dataclass(frozen=True)
class Trainee:
    """The model to train.

    Attributes:
        model: A ``TRMForCausalLM``, or a ``PeftModel`` around one, on the CPU.
        tokenizer: The language model's, with ``<think>`` and ``</think>``.
        form: How questions are put.
        added: Tokens that the tokenizer lacked.
    """

    model: Any
    tokenizer: Any
    form: PromptForm
    added: list[str]


def build_trainee(config: LoraTrainingConfig) -> Trainee:
    """Load the language model, and add the reasoner, adapters and tokens to train.

    Raises:
        InputError: A model or a run of phase 2 that cannot be loaded, or that do not fit together.
    """
    if config.lora:
        require("train", "peft")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    start = None if config.trm is None else start_from_phase2(config.trm)
    source = language_model_source(config.model)
    if (Path(source) / ADAPTERS_FILE).exists():
        # Otherwise peft would look for their base on the hub.
        raise InputError(
            f"--model {config.model} contains adapters, not a complete model: name the language model itself"
        )
    trusted = {"trust_remote_code": config.trust_remote_code}
    tokenizer = pretrained(AutoTokenizer, config.model, source, **trusted)
    form = prompt_form(tokenizer, config.prompt_form)
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    language_model = pretrained(AutoModelForCausalLM, config.model, source, dtype=dtype, **trusted)
    if type(language_model).__module__.startswith("transformers_modules.") and (
        config.merge or not config.lora
    ):
        raise InputError(
            f"model {config.model} needs its own Python files, which would not be saved with a complete "
            "model: save only adapters, without --merge and --no-lora"
        )
    added = add_think_tokens(tokenizer, language_model)
    require_padding(config.model, tokenizer)
    tokenizer.padding_side = "left"
    think, end_think = think_ids(tokenizer)
    width = language_model.config.get_text_config().hidden_size
    if start is not None:
        require_width(start, width)
    asked = config.reasoner.given()
    settings = default_sizes(width, asked) if start is None else start.settings
    model = TRMForCausalLM.wrap(
        language_model,
        think_token_id=think,
        end_think_token_id=end_think,
        **settings | asked,
    )
    # bfloat16 would round away AdamW's small steps, and digits of the weights from phase 2.
    model.model.reasoner.float()
    if start is not None:
        start.load_into(model)
    model.requires_grad_(False)
    new_tokens = [int(tokenizer.convert_tokens_to_ids(token)) for token in added]
    if config.lora:
        adapted = add_lora(model, config.lora_r, config.lora_alpha, config.lora_dropout, tokens=new_tokens)
        return Trainee(adapted, tokenizer, form, added)
    train_reasoner(model)
    if new_tokens:
        _train_rows(model, new_tokens)
    return Trainee(model, tokenizer, form, added)


def default_sizes(width: int, asked: dict[str, Any]) -> dict[str, Any]:
    """Default sizes of a reasoner for states of ``width``, given the settings in ``asked``."""
    toy = width < _TOY_WIDTH
    narrow = asked.get("d_compressed") or (width // 4 if width <= 256 else 256)
    recursed = narrow if asked.get("reasoner") == "sequence" else width
    return {
        "num_latents": 8 if toy else 256,
        "d_compressed": narrow,
        "n_heads": _heads(recursed),
        "compression_heads": _heads(width),
    }


def _heads(width: int) -> int:
    """The largest divisor of the width up to 8 that leaves each head at least 8 dimensions."""
    return next(heads for heads in range(max(1, min(8, width // 8)), 0, -1) if width % heads == 0)


def _train_rows(model: Any, tokens: list[int]) -> None:
    """Let gradients reach only the rows of ``tokens`` in the embeddings and the output head."""
    weights = {id(part.weight): part.weight for part in (model.get_input_embeddings(), model.lm_head)}
    for weight in weights.values():
        kept = torch.zeros(len(weight), 1)
        kept[tokens] = 1

        def only(gradient: Tensor, kept: Tensor = kept) -> Tensor:
            return gradient * kept.to(gradient)

        weight.requires_grad_(True)
        weight.register_hook(only)
