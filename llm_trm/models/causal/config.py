"""The configuration of a causal language model with a recursion at ``<think>``."""

from __future__ import annotations

from typing import Any, ClassVar, get_args

from transformers import AutoConfig, PretrainedConfig

from llm_trm.choices import Halting, ReasonerKind, Window
from llm_trm.errors import InputError
from llm_trm.ranges import (
    DEPTH,
    LAYERS,
    LENGTH,
    NO_OR_DEPTH,
    SHARE_BELOW_ONE,
    WEIGHT,
    WIDTH,
    Range,
    require_in,
    shown,
)

_RANGES: dict[str, Range] = {
    "num_latents": LENGTH,
    "d_compressed": WIDTH,
    "soft_tokens": DEPTH,
    "n_layers": LAYERS,
    "n_heads": WIDTH,
    "compression_heads": WIDTH,
    "n_latent_steps": NO_OR_DEPTH,
    "n_deep_recursions": DEPTH,
    "supervision_steps": DEPTH,
    "dropout": SHARE_BELOW_ONE,
    "halting_loss_weight": WEIGHT,
}

#: Layers whose cache has keys and values per position, so that a mask can exclude positions.
_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


class TRMConfig(PretrainedConfig):
    """Configuration of a :class:`~llm_trm.models.causal.TRMForCausalLM`.

    Args:
        text_config: Configuration of the wrapped decoder, or its dict with ``model_type``. Defaults to
            SmolLM3-3B.
        reasoner: ``"latents"``: M latents of the decoder's width D, each a soft token. ``"sequence"``: one
            reasoning state of width D', which is expanded to K soft tokens.
        num_latents: Number of latents M.
        d_compressed: Width D'.
        soft_tokens: Number of soft tokens K of ``"sequence"``.
        n_layers, n_heads: Number of blocks in the recursion's network, and of attention heads per block.
        compression_heads: Number of attention heads of the latents' compressor.
        n_latent_steps: Latent steps n per recursion.
        n_deep_recursions: Recursions T per supervision step.
        supervision_steps: Maximum number of supervision steps; all are taken without halting.
        dropout: Dropout probability of the recursion's attention weights in training.
        halting: Whose confidence ends a recursion early: each sample's own, the mean of the batch, or none.
            It applies in training too, so that log-probabilities can be recomputed.
        halting_loss_weight: Weight of the halting head's loss in ``loss``.
        window: ``"slide"``: a position sees the newest positions that fit into the decoder's context.
            ``"always"``: in addition, every recursion drops as many of the oldest positions as it appends
            soft tokens.
        think_token_id, end_think_token_id: Ids of ``<think>`` and ``</think>``.

    Raises:
        InputError: A value is invalid, or the decoder cannot be wrapped.
    """

    model_type = "trm"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values"]

    def __init__(
        self,
        text_config: PretrainedConfig | dict[str, Any] | None = None,
        *,
        reasoner: ReasonerKind = "latents",
        num_latents: int = 256,
        d_compressed: int = 256,
        soft_tokens: int = 1,
        n_layers: int = 2,
        n_heads: int = 8,
        compression_heads: int = 8,
        n_latent_steps: int = 6,
        n_deep_recursions: int = 3,
        supervision_steps: int = 8,
        dropout: float = 0.0,
        halting: Halting = "sample",
        halting_loss_weight: float = 0.1,
        window: Window = "slide",
        think_token_id: int | None = None,
        end_think_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.text_config = _decoder_config(text_config)
        self.reasoner: ReasonerKind = _one_of("reasoner", reasoner, get_args(ReasonerKind))
        self.num_latents, self.d_compressed, self.soft_tokens = num_latents, d_compressed, soft_tokens
        self.n_layers, self.n_heads, self.compression_heads = n_layers, n_heads, compression_heads
        self.n_latent_steps, self.n_deep_recursions = n_latent_steps, n_deep_recursions
        self.supervision_steps = supervision_steps
        self.dropout = dropout
        self.halting: Halting = _one_of("halting", halting, get_args(Halting))
        self.halting_loss_weight = halting_loss_weight
        self.window: Window = _one_of("window", window, get_args(Window))
        self.think_token_id, self.end_think_token_id = think_token_id, end_think_token_id
        kwargs["tie_word_embeddings"] = bool(getattr(self.text_config, "tie_word_embeddings", False))
        # Otherwise PretrainedConfig overwrites the decoder's attention implementation with its own None.
        kwargs.setdefault("attn_implementation", self.text_config._attn_implementation)
        super().__init__(**kwargs)
        self._require_sizes()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """See :meth:`PretrainedConfig.from_dict`.

        Raises:
            InputError: The dict describes a model of another type.
        """
        found = config_dict.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise InputError(
                f"this is a {found} model, not one with a recursion: wrap it with TRMForCausalLM.wrap, "
                "or load it with AutoModelForCausalLM"
            )
        return super().from_dict(config_dict, **kwargs)

    @property
    def tokens_per_thought(self) -> int:
        """Number of soft tokens that one ``<think>`` appends."""
        return int(self.num_latents if self.reasoner == "latents" else self.soft_tokens)

    @property
    def trains_halting(self) -> bool:
        """Whether the halting head is trained."""
        return self.halting != "none" and self.halting_loss_weight > 0

    @property
    def context(self) -> int | None:
        """Size of the decoder's context in positions; None if its configuration does not give it."""
        positions = getattr(self.text_config, "max_position_embeddings", None)
        return None if positions is None else int(positions)

    def _require_sizes(self) -> None:
        for name, within in _RANGES.items():
            require_in(within, name, getattr(self, name), InputError)
        width = self.text_config.hidden_size
        if self.reasoner == "sequence" and self.d_compressed >= width:
            raise InputError(
                f"d_compressed must be below the decoder's width of {width}, not {self.d_compressed}"
            )
        recursed = width if self.reasoner == "latents" else self.d_compressed
        if recursed % self.n_heads or (self.reasoner == "latents" and width % self.compression_heads):
            raise InputError(
                f"a width of {recursed} cannot be split into {self.n_heads} heads (n_heads) and "
                f"{self.compression_heads} heads (compression_heads): the width must be a multiple of both"
            )
        if self.context is not None and self.tokens_per_thought >= self.context:
            raise InputError(
                f"{self.tokens_per_thought} soft tokens do not fit into the decoder's context of "
                f"{self.context} positions"
            )


def _decoder_config(given: PretrainedConfig | dict[str, Any] | None) -> Any:
    if isinstance(given, PretrainedConfig):
        config = given
    else:
        settings = dict(given or {})
        kind = settings.pop("model_type", "smollm3")
        try:
            config = AutoConfig.for_model(kind, **settings)
        except ValueError as error:
            raise InputError(
                f"the decoder has the type {shown(kind)}, which transformers does not know: save a language "
                "model that needs its own code as adapters only"
            ) from error
    if config.is_encoder_decoder or config.get_text_config() is not config:
        raise InputError(f"a {config.model_type} model is not a text-only decoder and cannot be wrapped")
    unknown = set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYERS
    if unknown or not hasattr(config, "hidden_size"):
        raise InputError(
            f"a {config.model_type} model has layers other than attention over a sequence "
            f"({', '.join(sorted(unknown)) or 'no hidden_size'}): they cannot hide the soft tokens of some "
            "samples of a batch from the others"
        )
    return config


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> Any:
    if value not in allowed:
        raise InputError(f"{name} must be one of {', '.join(allowed)}, not {shown(value)}")
    return value
