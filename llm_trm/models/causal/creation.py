"""Creates a language model with a recursion from the name of a language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from llm_trm.errors import InputError, one_line
from llm_trm.extras import require
from llm_trm.models.causal.modeling import TRMForCausalLM
from llm_trm.models.causal.tokens import add_think_tokens, think_ids
from llm_trm.models.loading import language_model_source, pretrained

#: Names of the decoder's attention projections in a :class:`TRMForCausalLM`, without the reasoner's.
LORA_TARGETS = r"model\.decoder\..*\.(q|k|v|o)_proj"


def create_smollm_trm_model(
    model_name: str = "HuggingFaceTB/SmolLM3-3B",
    use_lora: bool = True,
    lora_r: int = 16,
    num_latents: int = 256,
    trm_kwargs: dict[str, Any] | None = None,
    *,
    lora_alpha: int = 32,
    lora_dropout: float = 0.1,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Create a trainable language model that recurs at ``<think>``; its tokenizer is ``model.tokenizer``.

    Args:
        model_name: A folder in Hugging Face format, the name of a model on the hub, or ``"arithmetic"``,
            the bundled model.
        use_lora: Whether to add LoRA adapters to the decoder. The reasoner is always trained; all other
            weights are frozen.
        lora_r, lora_alpha, lora_dropout: Rank, alpha and dropout of the adapters.
        num_latents: Number of latents M.
        trm_kwargs: Further settings of :class:`TRMConfig`.
        device: Device of the model; by default CUDA if available.
        dtype: Dtype of the weights; by default bfloat16 on CUDA and float32 elsewhere.
        trust_remote_code: Allow the language model's own Python files to run if it needs them.

    Returns:
        A :class:`TRMForCausalLM`, in a ``PeftModel`` if ``use_lora``.

    Raises:
        InputError: The model does not exist or cannot be wrapped, or peft is missing.
    """
    if use_lora:
        require("train", "peft")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    source = language_model_source(model_name)
    trusted = {"trust_remote_code": trust_remote_code}
    tokenizer = pretrained(AutoTokenizer, model_name, source, **trusted)
    language_model: Any = pretrained(AutoModelForCausalLM, model_name, source, dtype=dtype, **trusted)
    added = add_think_tokens(tokenizer, language_model.to(device))
    think, end_think = think_ids(tokenizer)
    settings = {"num_latents": num_latents, **(trm_kwargs or {})}
    model: Any = TRMForCausalLM.wrap(
        language_model, think_token_id=think, end_think_token_id=end_think, **settings
    )
    model.requires_grad_(False)
    if use_lora:
        new = [int(tokenizer.convert_tokens_to_ids(token)) for token in added]
        model = add_lora(model, lora_r, lora_alpha, lora_dropout, tokens=new)
    else:
        train_reasoner(model)
    model.tokenizer = tokenizer
    return model


def add_lora(
    model: TRMForCausalLM,
    r: int = 16,
    alpha: int = 32,
    dropout: float = 0.1,
    *,
    tokens: Sequence[int] = (),
) -> Any:
    """Wrap ``model`` in a ``PeftModel`` with adapters on its attention, trained and saved with the reasoner.

    Args:
        model: The model to adapt.
        r, alpha, dropout: Rank, alpha and dropout of the adapters.
        tokens: Ids of new tokens. Their embeddings and output head rows are trained and saved as well.

    Raises:
        InputError: The decoder's projections do not have the usual names.
    """
    from peft import LoraConfig, get_peft_model

    from llm_trm.models.causal.adapters import quietly, with_card

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=LORA_TARGETS,
        modules_to_save=["reasoner"],
        trainable_token_indices={name: list(tokens) for name in _token_modules(model)} if tokens else None,
    )
    try:
        with quietly():
            adapted: Any = with_card(get_peft_model(model, config))
    except ValueError as error:
        raise InputError(
            f"this {model.config.text_config.model_type} model does not support adapters "
            f"({one_line(error)}): set use_lora=False"
        ) from error
    freeze_halting(adapted)
    return adapted


def _token_modules(model: TRMForCausalLM) -> list[str]:
    """Names of the embeddings and of an untied output head; peft itself handles a tied head."""
    embeddings: Any = model.get_input_embeddings()
    wanted = [embeddings]
    if model.lm_head.weight is not embeddings.weight:
        wanted.append(model.lm_head)
    return [name for name, module in model.named_modules() if module in wanted]


def freeze_halting(model: Any) -> None:
    """Freeze an untrained halting head, since peft would train it with the reasoner."""
    if not model.config.trains_halting:
        for name, parameter in model.named_parameters():
            if "halt_head" in name:
                parameter.requires_grad_(False)


def train_reasoner(model: PreTrainedModel) -> None:
    """Enable gradients for the reasoner, except an untrained halting head."""
    for name, parameter in model.named_parameters():
        if ".reasoner." in f".{name}":
            parameter.requires_grad_(True)
    freeze_halting(model)
