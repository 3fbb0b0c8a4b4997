"""A causal language model that recurs in latent space at ``<think>``, in the interfaces of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, Cache, DynamicCache, GenerationMixin, PreTrainedModel

from llm_trm.data.reasoning import IGNORED
from llm_trm.errors import InputError, few, one_line
from llm_trm.models.causal.cache import Past, TRMCache, trm_cache
from llm_trm.models.causal.card import CardMixin
from llm_trm.models.causal.config import TRMConfig
from llm_trm.models.causal.halting import halting_loss
from llm_trm.models.causal.layout import Layout, lay_out, plain_layout
from llm_trm.models.causal.outputs import TRMCausalLMOutput, TRMModelOutput
from llm_trm.models.causal.passes import Passes, reads_in_portions
from llm_trm.models.causal.reasoners import build_reasoner
from llm_trm.upstream import cache_name, cache_of, either_cache
from llm_trm.weights import RESTORE

#: Columns that the decoder reads per pass when gradients are disabled. A pass over c columns that ends at
#: column C needs memory for a c x C mask and c rows of the widest layer. With 65,536 columns and SmolLM3's
#: width of 11,008 in bfloat16, that is 0.2 GB and 0.07 GB, compared to 4.8 GB of keys and values.
PREFILL_CHUNK = 1024


class TRMPreTrainedModel(PreTrainedModel):
    """Base class of the backbone and the language model."""

    config: TRMConfig
    config_class = TRMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    # Soft tokens cannot be undone, so the model is stateful in transformers' terms: no assisted generation.
    _is_stateful = True

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, name: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """See :meth:`PreTrainedModel.from_pretrained`.

        Raises:
            InputError: Weights are missing, or do not have the shapes of the configuration.
        """
        try:
            loaded: Any = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)
        except RuntimeError as error:
            if "mismatched" not in str(error) and "size" not in str(error):
                raise
            raise InputError(
                f"{name}: the shapes of its weights do not match its configuration or the requested sizes "
                f"({one_line(error, 80)}): train again for these sizes"
            ) from error
        model, info = loaded
        if missing := sorted(info["missing_keys"]):
            raise InputError(f"{name} lacks {len(missing)} weights of this model ({few(missing)}): {RESTORE}")
        return (model, info) if output_loading_info else model


class TRMModel(TRMPreTrainedModel):
    """The backbone: a decoder, and a reasoner that adds soft tokens after every ``<think>``.

    The reasoner reads the final-norm states of all positions in its window before a ``<think>``, including
    earlier soft tokens. Positions count tokens and soft tokens, but not padding. The output has the length
    of ``input_ids``: the state at ``<think>`` is the state of its last soft token.

    Args:
        config: Configuration of the model.
        decoder: The decoder to wrap; a new one by default.

    Attributes:
        prefill_chunk: Maximum number of tokens to read per pass when gradients are disabled. Only keys,
            values and final-norm states are kept. None reads all tokens in one pass, as do models with
            sharded weights or with rotary frequencies that depend on the length.
    """

    def __init__(self, config: TRMConfig, decoder: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.prefill_chunk: int | None = PREFILL_CHUNK
        self.decoder: Any = _new_decoder(config.text_config) if decoder is None else decoder
        embeddings: Any = self.decoder.get_input_embeddings()
        self.reasoner: Any = build_reasoner(config, embeddings.embedding_dim)
        if not config.trains_halting:
            self.reasoner.trm.halt_head.requires_grad_(False)
        if not embeddings.weight.is_meta:
            self.reasoner.entry.match(embeddings.weight)
            _keep(self)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The decoder's input embeddings."""
        return self.decoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the decoder's input embeddings."""
        self.decoder.set_input_embeddings(value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        use_trm: bool = True,
        keep: slice | Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> TRMModelOutput:
        """Read tokens, and think at every ``<think>``.

        With a cache, the decoder reads every token once. Without one, which is the default when gradients
        are enabled, it reads all of them again after each round of thoughts, because gradient checkpointing
        drops caches.

        Args:
            input_ids: [B, L]; with a cache, only the new tokens.
            attention_mask: 1 at tokens and 0 at padding on either side, for all tokens so far [B, past + L].
            position_ids: With the recursion, these must equal the token counts of ``attention_mask``.
            cache: The cache that an earlier call returned, or an empty one.
            inputs_embeds: Only without the recursion, which needs ids to find ``<think>``.
            use_cache: Whether to return a cache.
            use_trm: False to run the decoder alone.
            keep: Positions whose ``last_hidden_state`` to return; all by default.
            past_key_values: ``cache`` under its name before transformers 5.24.
            **kwargs: Passed to the decoder.

        Raises:
            InputError: The recursion does not support the input.
        """
        given = either_cache(cache, past_key_values)
        if not use_trm:
            if isinstance(given, TRMCache):
                raise InputError("this cache contains soft tokens: continue with use_trm=True")
            output = self.decoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **{cache_name(): given},
                **kwargs,
            )
            if keep is not None:
                output["last_hidden_state"] = output.last_hidden_state[:, keep]
            return TRMModelOutput(**output)
        kwargs.pop("return_dict", None)
        if input_ids is None or inputs_embeds is not None:
            raise InputError("the recursion needs input_ids to find <think>: embeddings need use_trm=False")
        if self.config.think_token_id is None:
            raise InputError("this model has no <think> token: call add_think_tokens(tokenizer, model)")
        if kwargs.get("output_attentions"):
            raise InputError("attentions cannot represent soft tokens: output_attentions needs use_trm=False")
        cache = None if given is None else trm_cache(given)
        valid = self._valid(input_ids, attention_mask, cache)
        think = (input_ids == self.config.think_token_id) & valid
        first = cache is None or cache.past is None
        # One copy from the device for both masks, because the layout depends on them.
        host_valid, host_think = torch.stack((valid, think)).cpu()
        if first:
            self._check_tokens(host_valid, position_ids)
        layout = (
            lay_out(host_valid, host_think, self.config.tokens_per_thought, self._rounds(host_think, first))
            if host_think.any() or (first and self.training)
            else plain_layout(host_valid)
        )
        chunk = self._chunk(layout)
        cache, returned = self._cache(cache, use_cache, bool(layout.thinking) or chunk is not None)
        past = None if cache is None else cache.past
        if past is None:
            past = Past(len(input_ids), input_ids.device)
        past.gaps |= layout.gaps
        past.holes |= bool(layout.thinking) and len(input_ids) > 1
        passes = Passes(
            self.decoder, past, None if cache is None else cache.decoder, self.config.context, kwargs
        )
        rounds = self._read(passes, layout, input_ids, chunk)
        if cache is not None:
            cache.past, cache.tokens = past, cache.tokens + input_ids.shape[1]
        keep = keep.cpu() if isinstance(keep, Tensor) else keep
        return TRMModelOutput(
            last_hidden_state=passes.states(layout.outputs if keep is None else layout.outputs[:, keep]),
            hidden_states=passes.layers(layout.outputs) or None,
            **{**rounds, cache_name(): cache if returned else None},
        )

    def _chunk(self, layout: Layout) -> int | None:
        """Number of columns per pass; None to read each segment in one pass."""
        longest = max(segment.shape[1] for segment in layout.segments)
        if self.prefill_chunk is None or longest <= self.prefill_chunk or torch.is_grad_enabled():
            return None
        return None if self._drops_cache() or not reads_in_portions(self.decoder) else self.prefill_chunk

    def _read(self, passes: Passes, layout: Layout, input_ids: Tensor, chunk: int | None) -> dict[str, Any]:
        """Run all passes; return the outputs of the recursions."""
        device = input_ids.device
        soft: tuple[Tensor, Tensor] | None = None
        facts: dict[str, list[Tensor]] = {"trm_steps": [], "halt_logits": [], "lost": []}
        for index, segment in enumerate(layout.segments):
            columns = segment.shape[1] + (0 if soft is None else soft[1].shape[1])
            passes.read(self._portions(input_ids, segment.to(device), soft, chunk), columns)
            if index < len(layout.thinking):
                soft = self._think(passes.past, layout.thinking[index], facts)
        lost = facts.pop("lost")
        found: dict[str, Any] = {name: torch.stack(rounds, dim=1) for name, rounds in facts.items() if rounds}
        if lost:
            found["reconstruction_error"] = torch.cat(lost).mean()
        return found

    def _portions(
        self, input_ids: Tensor, segment: Tensor, soft: tuple[Tensor, Tensor] | None, chunk: int | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield embeddings [B, c, E] of the soft tokens and the segment, and which are valid, [B, c]."""
        for portion in segment.split(chunk or max(segment.shape[1], 1), dim=1):
            valid = portion >= 0
            embeddings = self.get_input_embeddings()(input_ids.gather(1, portion.clamp(min=0)))
            if soft is not None:
                embeddings = torch.cat((soft[0].to(embeddings.dtype), embeddings), dim=1)
                valid = torch.cat((soft[1], valid), dim=1)
                soft = None
            yield embeddings, valid

    def _think(self, past: Past, thinking: Tensor, facts: dict[str, list[Tensor]]) -> tuple[Tensor, Tensor]:
        """Soft tokens [B, K, E] of the samples whose last token is ``<think>``, and which are valid."""
        device = past.valid.device
        # If no sample thinks, another process has some that do: run the same passes here on a dummy row.
        anyone = bool(thinking.any())
        rows = (thinking.nonzero().squeeze(1) if anyone else torch.tensor([0])).to(device)
        thinking = thinking.to(device)
        positions = past.positions
        at = positions.amax(1)
        oldest = past.dropped
        if self.config.context is not None:
            oldest = torch.maximum(oldest, at - (self.config.context - 1))
        before = (positions >= oldest[:, None]) & (positions < at[:, None])
        context = past.valid & before & thinking[:, None]
        states = past.join_states(oldest)
        context = context[:, past.gone :]
        if len(rows) < len(thinking):
            states, context = states[rows], context[rows]
        thought = self.reasoner(states, context)
        count = thought.soft_tokens.shape[1]
        if self.config.window == "always":
            self._drop(past, thinking, at - oldest, oldest, count)
        batch = len(thinking)
        soft = thought.soft_tokens.new_zeros(batch, *thought.soft_tokens.shape[1:])
        soft = soft.index_copy(0, rows, thought.soft_tokens)
        steps = thought.steps.new_zeros(batch).index_copy(0, rows, thought.steps) * thinking
        past.steps.append(steps)
        facts["trm_steps"].append(steps)
        facts["halt_logits"].append(
            thought.halt_logits.new_zeros(batch).index_copy(0, rows, thought.halt_logits)
        )
        if anyone:
            facts["lost"].append(thought.reconstruction_error)
        return soft, thinking[:, None].expand(-1, count)

    @staticmethod
    def _drop(past: Past, thinking: Tensor, length: Tensor, oldest: Tensor, count: int) -> None:
        shortest = int(torch.where(thinking, length, count + 1).min())
        if shortest <= count:
            raise InputError(
                f"{shortest} positions before <think> are too few to replace {count} with soft tokens: use "
                "window='slide', or fewer soft tokens"
            )
        past.dropped = torch.where(thinking, oldest + count, past.dropped)
        past.drops = True

    def _valid(self, input_ids: Tensor, attention_mask: Tensor | None, cache: TRMCache | None) -> Tensor:
        if attention_mask is None:
            return torch.ones_like(input_ids, dtype=torch.bool)
        seen = 0 if cache is None else cache.tokens
        expected = (input_ids.shape[0], seen + input_ids.shape[1])
        if not isinstance(attention_mask, Tensor) or tuple(attention_mask.shape) != expected:
            shape = list(getattr(attention_mask, "shape", ())) or type(attention_mask).__name__
            raise InputError(
                f"the recursion needs an attention_mask {list(expected)} of all tokens, not {shape}"
            )
        return attention_mask[:, seen:] != 0

    def _check_tokens(self, valid: Tensor, position_ids: Tensor | None) -> None:
        longest, context = int(valid.sum(1).max()), self.config.context
        if context is not None and longest > context:
            raise InputError(
                f"a sequence of {longest} tokens does not fit the decoder's context of {context}: shorten it"
            )
        if position_ids is None:
            return
        counted = valid.long().cumsum(1) - 1
        if not torch.equal(position_ids.cpu().expand_as(counted)[valid], counted[valid]):
            raise InputError(
                "the recursion computes positions itself: omit position_ids, or set use_trm=False "
                "(samples packed into one row cannot think)"
            )

    def _rounds(self, think: Tensor, first: bool) -> int:
        """Number of rounds in every process of a training run, so that all issue the same collectives."""
        rounds = int(think.sum(1).max())
        distributed = torch.distributed
        if not (first and self.training and distributed.is_available() and distributed.is_initialized()):
            return rounds
        if distributed.get_world_size() == 1:
            return rounds
        # At least one round, because DDP waits for the gradient of every parameter.
        agreed = torch.tensor(max(rounds, 1), device=self.device)
        distributed.all_reduce(agreed, op=distributed.ReduceOp.MAX)
        return int(agreed)

    def _cache(
        self, given: TRMCache | None, wanted: bool | None, several: bool
    ) -> tuple[TRMCache | None, bool]:
        """The cache to use for one pass or ``several``, and whether to return it."""
        dropped = self._drops_cache()
        if given is None and wanted is None:
            wanted = not self.training and not torch.is_grad_enabled()
        if given is not None or wanted:
            if dropped:
                raise InputError(
                    "gradient checkpointing drops the cache in training mode: call model.eval() or "
                    "model.gradient_checkpointing_disable() before generating, or set use_cache=False"
                )
        elif dropped or torch.is_grad_enabled() or not several:
            return None, False
        if given is None:
            given = TRMCache(DynamicCache(config=self.config.text_config))
        return given, wanted is not False

    def _drops_cache(self) -> bool:
        """Whether the decoder's layers drop caches, as gradient checkpointing does."""
        return self.training and any(
            getattr(module, "gradient_checkpointing", False) for module in self.decoder.modules()
        )


class TRMForCausalLM(CardMixin, TRMPreTrainedModel, GenerationMixin):
    """A language model that recurs at every ``<think>``, whether in the prompt or generated.

    Args:
        config: Configuration of the model.
        language_model: The language model whose decoder and output head to use; new ones by default.
    """

    def __init__(self, config: TRMConfig, language_model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        decoder: Any = None if language_model is None else language_model.base_model
        self.model = TRMModel(config, decoder)
        self.vocab_size = config.text_config.vocab_size
        embeddings = self.model.get_input_embeddings()
        if language_model is None:
            self.lm_head = nn.Linear(config.text_config.hidden_size, self.vocab_size, bias=False)
        else:
            self.lm_head = language_model.get_output_embeddings()
            self.model.reasoner.entry.match_head(embeddings.weight, self.lm_head.weight)
            _keep(self)
        name = next(name for name, module in self.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The decoder's input embeddings."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the decoder's input embeddings."""
        self.model.set_input_embeddings(value)

    @classmethod
    def wrap(cls, language_model: PreTrainedModel, **settings: Any) -> TRMForCausalLM:
        """Add a reasoner to a language model. Its weights are shared, not copied.

        Args:
            language_model: A model loaded by ``AutoModelForCausalLM``.
            **settings: Arguments of :class:`TRMConfig`.

        Raises:
            InputError: The model cannot be wrapped.
        """
        config = TRMConfig(language_model.config, **settings)
        _require_plain_head(language_model)
        model = cls(config, language_model)
        # Move only the reasoner, because the model may span several devices.
        model.model.reasoner.to(model.get_input_embeddings().weight.device, language_model.dtype)
        model.generation_config = language_model.generation_config
        return model.train(language_model.training)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        use_trm: bool = True,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> TRMCausalLMOutput | tuple[Any, ...]:
        """Compute logits, and the loss if there are ``labels``.

        See :meth:`TRMModel.forward` for the other arguments.

        Args:
            labels: [B, L], -100 for no label. They are shifted here: the logits at a position predict the
                label after it, so the token after ``<think>`` is predicted from the last soft token.
            logits_to_keep: Number of last positions to compute logits for (0 for all), or their indices.
            num_items_in_batch: Divisor of the summed loss, instead of the number of labels in this batch.
        """
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        given = either_cache(cache, past_key_values)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=given,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            use_trm=use_trm,
            keep=kept,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        result = TRMCausalLMOutput(
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            trm_steps=outputs.trm_steps,
            halt_logits=outputs.halt_logits,
            reconstruction_error=outputs.reconstruction_error,
            **{cache_name(): cache_of(outputs)},
        )
        if labels is not None:
            if logits.shape[:2] != labels.shape:
                raise InputError(
                    f"labels {list(labels.shape)} do not match the logits {list(logits.shape[:2])}: leave "
                    "logits_to_keep at 0"
                )
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.text_config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
            if outputs.halt_logits is not None and given is None:
                loss = loss + self._halting(result, input_ids, attention_mask, labels, num_items_in_batch)
            result = TRMCausalLMOutput(**{**result, "loss": loss})
        return result if return_dict is not False else result.to_tuple()

    def _halting(
        self,
        result: TRMCausalLMOutput,
        input_ids: Any,
        attention_mask: Tensor | None,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None,
    ) -> Tensor | float:
        config = self.config
        if not config.trains_halting:
            return 0.0
        think = input_ids == config.think_token_id
        if attention_mask is not None:
            think = think & (attention_mask != 0)
        logits: Any = result.logits
        halting: Any = result.halt_logits
        result["halting_loss"] = halting_loss(halting, think, logits, labels)
        share: Tensor | float = 1.0
        if num_items_in_batch is not None:
            # This batch's fraction of the items, so that accumulated batches add up to a mean.
            share = (labels[:, 1:] != IGNORED).sum() / num_items_in_batch
        return config.halting_loss_weight * share * result["halting_loss"]

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        result = super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, *args, **kwargs
        )
        cache = model_kwargs.get(cache_name())
        if cache is not None and model_kwargs.get("use_trm", True):
            model_kwargs[cache_name()] = trm_cache(cache)
        return result

    def generate(
        self, *args: Any, cache: Cache | None = None, past_key_values: Cache | None = None, **kwargs: Any
    ) -> Any:
        """See :meth:`GenerationMixin.generate`. The cache can be passed under either of its names."""
        given = either_cache(cache, past_key_values)
        if given is not None:
            kwargs[cache_name()] = given
        return super().generate(*args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Reject continuous batching; ``generate_batch`` calls this as well.

        Raises:
            InputError: Always.
        """
        raise InputError(
            "the paged cache of continuous batching (generate_batch) does not support soft tokens: use "
            "generate, which accepts padded batches"
        )


def _new_decoder(config: Any) -> Any:
    # Explicit, because transformers would otherwise prompt on standard input before running remote code.
    return AutoModel.from_config(config, trust_remote_code=False)


def _keep(model: nn.Module) -> None:
    """Keep transformers from initialising weights again that are already initialised or loaded."""
    for module in model.modules():
        module._is_hf_initialized = True  # type: ignore[assignment]


@torch.no_grad()
def _require_plain_head(language_model: PreTrainedModel) -> None:
    """Raise InputError unless the logits are exactly the output head applied to the backbone's states."""
    head, kind = language_model.get_output_embeddings(), language_model.config.model_type
    if head is None or language_model.base_model is language_model:
        raise InputError(f"a {kind} model has no output head and cannot be wrapped")
    # Several tokens, because the embedding of a padding token is zero, and so are its logits at any scale.
    tokens = torch.arange(min(4, head.out_features), device=language_model.device)[None]
    # With dropout, two passes in training mode differ.
    with _evaluating(language_model):
        whole = language_model(input_ids=tokens, use_cache=False).logits
        plain = head(language_model.base_model(input_ids=tokens, use_cache=False)[0])
    if torch.equal(plain, whole):
        return
    # NaN differs from itself, so it would look like a scale.
    if not torch.isfinite(whole).all():
        raise InputError(
            f"the logits of this {kind} model contain NaN or infinity: load weights that are finite"
        )
    raise InputError(
        f"this {kind} model scales or caps its logits after the output head and cannot be wrapped"
    )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, then restore the mode of every submodule."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
