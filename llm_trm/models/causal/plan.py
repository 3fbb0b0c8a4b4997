"""Estimates the memory of a language model with a recursion from its configuration alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from llm_trm.errors import InputError
from llm_trm.models.causal.config import TRMConfig
from llm_trm.models.causal.creation import LORA_TARGETS
from llm_trm.models.causal.modeling import PREFILL_CHUNK, TRMForCausalLM
from llm_trm.models.loading import UntrustedCodeError, language_model_source, pretrained
from llm_trm.ranges import BATCH, LENGTH, NO_OR_WIDTH, require_ranges

SMOLLM3 = "HuggingFaceTB/SmolLM3-3B"
#: Values that a block of the recursion keeps per row and column for the backward pass. Measured: 12.5 with
#: the C++ kernels, 20.5 in eager mode.
_BLOCK = 16
_FLOAT32 = 4


@dataclass(frozen=True)
class PlanSettings:
    """The workload to plan for.

    Attributes:
        tokens: Tokens per sample, prompt and answer.
        batch_size: Samples per batch.
        dtype: Dtype of the frozen weights. Trained weights, gradients and AdamW's two states are float32.
        training: Whether there is a backward pass.
        lora_r: Rank of the adapters on the attention projections; 0 for none.
        gradient_checkpointing: Whether the decoder's layers are recomputed in the backward pass.

    Raises:
        InputError: A value is out of range.
    """

    tokens: Annotated[int, LENGTH] = 4096
    batch_size: Annotated[int, BATCH] = 1
    dtype: torch.dtype = torch.bfloat16
    training: bool = True
    lora_r: Annotated[int, NO_OR_WIDTH] = 16
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        require_ranges(self, InputError)


@dataclass(frozen=True)
class Plan:
    """Parameter counts and memory in bytes.

    Attributes:
        language_model, adapters: Number of parameters.
        reasoner: Number of parameters per part.
        trained: Number of parameters with a gradient.
        copied: Number of parameters in the copy of the untrained reasoner that peft keeps.
        weights, gradients, optimizer: Bytes, exact.
        keys_and_values: Bytes of the cache in generation, exact. Training has no cache.
        states: Bytes of the final-norm states that recursions read; training counts them as activations.
        activations: Peak memory of everything else in bytes, an estimate.
    """

    language_model: int
    reasoner: dict[str, int]
    adapters: int
    trained: int
    copied: int
    weights: int
    gradients: int
    optimizer: int
    keys_and_values: int
    states: int
    activations: int

    @property
    def total(self) -> int:
        """Total number of bytes."""
        held = self.weights + self.gradients + self.optimizer
        return held + self.keys_and_values + self.states + self.activations


def decoder_config(name: str) -> Any:
    """The configuration of a language model; SmolLM3-3B does not need the hub.

    Raises:
        InputError: The model does not exist.
    """
    if name == SMOLLM3:
        return AutoConfig.for_model("smollm3", max_position_embeddings=65536)
    try:
        return pretrained(AutoConfig, name, language_model_source(name))
    except UntrustedCodeError as error:
        raise InputError(
            f"model {name} comes with Python code, which is not run for a plan: choose another model"
        ) from error


def make_plan(config: TRMConfig, settings: PlanSettings) -> Plan:
    """Estimate the memory of ``config`` with ``settings``. Loads no weights: the model is on the meta device.

    Raises:
        InputError: The tokens exceed the decoder's context.
    """
    if config.context is not None and settings.tokens > config.context:
        raise InputError(
            f"{settings.tokens} tokens do not fit the decoder's context of {config.context}: lower --context"
        )
    with torch.device("meta"):
        model = TRMForCausalLM(config)
    reasoner = _parts(model.model.reasoner)
    thinking = sum(reasoner.values())
    frozen = sum(weight.numel() for weight in model.parameters()) - thinking
    adapters = _adapters(model, settings.lora_r)
    untrained = 0 if config.trains_halting else _count(model.model.reasoner.trm.halt_head)
    item = settings.dtype.itemsize
    if settings.training:
        trained = thinking - untrained + adapters
        copied = thinking if settings.lora_r else 0
        weights = frozen * item + (thinking + copied + adapters) * _FLOAT32
        held, states = 0, 0
        activations = _training_activations(config, settings)
    else:
        trained = copied = 0
        weights = (frozen + thinking + adapters) * item
        columns = settings.tokens + config.tokens_per_thought
        held = cache_bytes(config.text_config, settings.batch_size, columns, item)
        states = settings.batch_size * columns * config.text_config.hidden_size * item
        activations = _inference_activations(config, settings)
    return Plan(
        language_model=frozen,
        reasoner=reasoner,
        adapters=adapters,
        trained=trained,
        copied=copied,
        weights=weights,
        gradients=trained * _FLOAT32,
        optimizer=trained * 2 * _FLOAT32,
        keys_and_values=held,
        states=states,
        activations=activations,
    )


def cache_bytes(config: PretrainedConfig, batch_size: int, columns: int, item: int) -> int:
    """Bytes of a decoder's keys and values for ``columns`` columns, with ``item`` bytes per value."""
    sizes = _Sizes.of(config)
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    kinds = kinds or ["sliding_attention" if window else "full_attention"] * sizes.layers
    # A layer with a window keeps what its next position sees, except that position itself.
    within = columns if window is None else min(columns, window - 1)
    kept = sum(columns if kind == "full_attention" else within for kind in kinds)
    return 2 * kept * batch_size * sizes.keys * item


@dataclass(frozen=True)
class _Sizes:
    layers: int
    hidden: int
    inner: int
    queries: int
    keys: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> _Sizes:
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        groups = getattr(config, "num_key_value_heads", None) or heads
        return cls(
            config.num_hidden_layers,
            config.hidden_size,
            getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            heads * width,
            groups * width,
            config.vocab_size,
        )


def _count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _parts(reasoner: nn.Module) -> dict[str, int]:
    parts = {"compressor": 0, "recursion": 0, "projection": 0}
    for name, weight in reasoner.named_parameters():
        if name.startswith("entry."):
            parts["projection"] += weight.numel()
        elif "compressor." in name or name.startswith("expansion."):
            parts["compressor"] += weight.numel()
        else:
            parts["recursion"] += weight.numel()
    return parts


def _adapters(model: nn.Module, rank: int) -> int:
    return sum(
        rank * (module.in_features + module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.fullmatch(LORA_TARGETS, name)
    )


def _training_activations(config: TRMConfig, settings: PlanSettings) -> int:
    """Assume ``<think>`` at the end: the decoder reads the tokens, then reads all again with soft tokens.

    Per token, a layer keeps the float32 inputs of two norms; query, keys and values (repeated for each head)
    and the output of attention; gate, its SiLU, and up; and with adapters, their inputs and dropout mask.
    The first pass needs gradients only with adapters. The loss keeps the logits, and in float32 their
    log-softmax and gradient. The reasoner keeps the last recursion of the last supervision step.
    """
    sizes, item = _Sizes.of(config.text_config), settings.dtype.itemsize
    again = settings.tokens + config.tokens_per_thought
    columns = again + (settings.tokens if settings.lora_r else 0)
    layer = 2 * _FLOAT32 * sizes.hidden + item * (4 * sizes.queries + 3 * sizes.inner)
    if settings.lora_r:
        layer += (item + 1) * (3 * sizes.hidden + sizes.queries)
    copies = item + 2 * _FLOAT32 + (_FLOAT32 if item < _FLOAT32 else 0)
    logits = settings.tokens * sizes.vocabulary * copies
    if settings.gradient_checkpointing:
        # The logits are freed before the layers are recomputed one at a time.
        decoder = columns * sizes.layers * item * sizes.hidden + max(again * layer, logits)
    else:
        decoder = columns * sizes.layers * layer + logits
    steps = config.n_layers * (config.n_latent_steps + 1)
    width, rows, read = _recursed(config, settings.tokens)
    reasoner = _FLOAT32 * (read + steps * rows * width * _BLOCK)
    return settings.batch_size * (decoder + reasoner)


def _inference_activations(config: TRMConfig, settings: PlanSettings) -> int:
    """The maximum of three phases: a layer reads a portion of the prompt, the reasoner thinks, or logits.

    A layer needs the portion's mask over all columns up to its end, the states and their norm. In addition,
    attention needs query, key, value, its output, a float mask, and one layer's old and new keys and values,
    also repeated for each head; the MLP needs gate, up and their product.
    """
    sizes, item = _Sizes.of(config.text_config), settings.dtype.itemsize
    columns = settings.tokens + config.tokens_per_thought
    portion = min(PREFILL_CHUNK, settings.tokens)
    # The mask of the last full portion, or of the remainder.
    whole = settings.tokens // portion * portion
    mask = max(portion * whole, (settings.tokens - whole) * settings.tokens)
    attention = 4 * portion * sizes.queries + mask + 2 * columns * (sizes.keys + sizes.queries)
    mlp = 3 * portion * sizes.inner
    layer = mask + item * (2 * portion * sizes.hidden + max(attention, mlp))
    width, rows, read = _recursed(config, settings.tokens)
    # A block needs its inner width twice, and the recursion needs x, y, z and their sums.
    reasoner = item * (read + rows * width * 16)
    logits = sizes.vocabulary * (item + _FLOAT32)
    return settings.batch_size * max(layer, reasoner, logits)


def _recursed(config: TRMConfig, tokens: int) -> tuple[int, int, int]:
    """Width and rows of the recursion, and the number of context values that its compressor keeps."""
    width = config.text_config.hidden_size
    if config.reasoner == "latents":
        # States without padding, states with positions, and keys and values.
        return width, config.num_latents, 5 * tokens * width
    return config.d_compressed, tokens + 1, tokens * (2 * width + config.d_compressed)
