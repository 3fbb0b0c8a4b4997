"""Runs a decoder over portions of columns, with a cache or by reading all columns again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PretrainedConfig
from transformers.masking_utils import create_masks_for_generate

from llm_trm.errors import InputError
from llm_trm.models.causal.cache import Past
from llm_trm.upstream import cache_name

#: Rotary frequencies that depend on the length, and so would differ between the keys of one cache.
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


class Passes:
    """Feeds a decoder portion by portion.

    Args:
        decoder: The wrapped backbone.
        past: The columns that it has seen; updated in place.
        cache: Keys and values of these columns; None to read all columns again with every portion, which
            gradient checkpointing needs because it drops caches.
        context: Maximum number of positions that a column sees.
        options: Further arguments of the decoder.
    """

    def __init__(
        self,
        decoder: Any,
        past: Past,
        cache: Cache | None,
        context: int | None,
        options: dict[str, Any],
    ) -> None:
        self._decoder, self._cache, self._context, self._options = decoder, cache, context, options
        self.past = past
        self._embeddings: list[Tensor] = []
        self._positions: list[Tensor] = []
        self._results: list[tuple[Tensor, ...]] = []
        self._shared_mask: Tensor | None = None
        self._last_column = 0

    def read(self, portions: Iterable[tuple[Tensor, Tensor]], columns: int) -> None:
        """Feed ``columns`` columns, one pass per portion; without a cache, all in one portion.

        Args:
            portions: Embeddings [B, c, E], and which columns are not empty, [B, c].
            columns: Total number of columns, the sum of all c.
        """
        joined: tuple[Tensor, ...] = ()
        start = 0
        self._last_column = self.past.columns + columns
        for embeddings, valid in portions:
            result = self._pass(embeddings, valid)
            if valid.shape[1] == columns:
                joined = result
                break
            # Fill the result pass by pass: concatenating at the end would need twice the memory.
            joined = joined or tuple(
                states.new_empty(len(states), columns, states.shape[-1]) for states in result
            )
            for whole, states in zip(joined, result, strict=True):
                whole[:, start : start + states.shape[1]] = states
            start += valid.shape[1]
        if self._cache is None:
            self._results, self.past.states, self.past.gone = [joined], [joined[0]], 0
        else:
            self._results.append(joined)
            self.past.states.append(joined[0])

    def _pass(self, embeddings: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
        positions = self.past.append(valid, self._context)
        if self._cache is None:
            self._embeddings.append(embeddings)
            self._positions.append(positions)
            embeddings, positions = torch.cat(self._embeddings, 1), torch.cat(self._positions, 1)
        output = self._decoder(
            inputs_embeds=embeddings,
            attention_mask=self._mask(embeddings),
            position_ids=positions,
            use_cache=self._cache is not None,
            **{cache_name(): self._cache},
            **self._options,
        )
        return (output.last_hidden_state, *(getattr(output, "hidden_states", None) or ()))

    def states(self, columns: Tensor) -> Tensor:
        """Final-norm states at ``columns`` [B, n] (on the CPU) of this call; zeros where a column is -1."""
        return self._at(columns, 0)

    def layers(self, columns: Tensor) -> tuple[Tensor, ...]:
        """The states of every layer at ``columns``, if the options request them."""
        return tuple(self._at(columns, index) for index in range(1, len(self._results[0])))

    def _at(self, columns: Tensor, index: int) -> Tensor:
        parts = [result[index] for result in self._results]
        # Skip results before the first requested column: in generation, the prompt.
        first = int(torch.where(columns < 0, columns.new_tensor(2**62), columns).min())
        before = 0
        while len(parts) > 1 and first >= before + parts[0].shape[1]:
            before += parts.pop(0).shape[1]
        states = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        columns = columns.to(states.device)
        found = (columns - before).clamp(min=0)[..., None].expand(-1, -1, states.shape[-1])
        return states.gather(1, found).masked_fill((columns < 0)[..., None], 0.0)

    def _mask(self, embeddings: Tensor) -> Any:
        past, config = self.past, self._decoder.config
        slides = self._context is not None and past.columns > self._context
        self._check_local_windows(config)
        if not slides and not past.drops:
            return past.valid.long() if past.gaps else self._triangle(embeddings)
        if slides:
            _require_sliding(config)
        if embeddings.shape[1] == 1:
            return past.visible(past.columns).long()
        positions, floor = past.positions, past.floor

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return positions[batch, key] >= floor[batch, query]

        return create_masks_for_generate(
            config=config,
            inputs_embeds=embeddings,
            attention_mask=past.valid,
            and_mask_function=sees,
            **{cache_name(): self._cache},
        )

    def _triangle(self, embeddings: Tensor) -> Tensor | None:
        """On a CPU, the mask of a portion that follows others, as a view of one mask for all portions.

        For 512 columns that see 65,536, with one head on one core, transformers' boolean mask takes 143 ms to
        build and attention with it takes 199 ms per layer, against 65 ms with a float mask. GPUs build masks
        quickly, and their kernels restrict the memory layout of a view.
        """
        columns, seen, config = embeddings.shape[1], self.past.columns, self._decoder.config
        alone = self._cache is None or columns in (1, seen) or _local_window(config) is not None
        if alone or embeddings.device.type != "cpu" or config._attn_implementation != "sdpa":
            return None
        mask = self._shared_mask
        if mask is None or mask.shape[0] < columns or mask.shape[1] < seen or mask.dtype != embeddings.dtype:
            mask = torch.zeros(columns, max(seen, self._last_column), dtype=embeddings.dtype)
            mask[:, -columns:] = torch.full((columns, columns), -torch.inf).triu(1)
            self._shared_mask = mask
        return mask[None, None, -columns:, -seen:]

    def _check_local_windows(self, config: PretrainedConfig) -> None:
        """Raise InputError if a layer's local window would count empty columns."""
        width = _local_window(config)
        if self.past.holes and width is not None and self.past.columns > width:
            raise InputError(
                f"layers of this {config.model_type} model see only {width} positions, and the soft tokens "
                "of some samples of a batch would use up positions of the others: use batches of one sample"
            )


def _local_window(config: PretrainedConfig) -> int | None:
    types = getattr(config, "layer_types", None)
    width = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    return None if types is not None and set(types) == {"full_attention"} else width


def _require_sliding(config: PretrainedConfig) -> None:
    rope = getattr(config, "rope_parameters", None)
    kind = rope.get("rope_type", "default") if isinstance(rope, dict) else None
    if kind is None or kind in _LENGTH_DEPENDENT_ROPE:
        raise InputError(
            f"tokens and soft tokens exceed the context of {config.max_position_embeddings} positions, and "
            f"this {config.model_type} model does not support a sliding window: shorten the prompt or the "
            "answer"
        )


def reads_in_portions(decoder: nn.Module) -> bool:
    """Whether a prefix can be read in several passes.

    Rotary frequencies that depend on the length would give other results than one pass. If the weights are
    sharded (FSDP, DeepSpeed's ZeRO-3), all processes must run the same number of passes, but their prefixes
    may need different numbers.
    """
    rope = getattr(decoder.config, "rope_parameters", None) or {}
    # Either one set of parameters, or one per type of layer.
    sets = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    if any(parameters.get("rope_type") in _LENGTH_DEPENDENT_ROPE for parameters in sets):
        return False
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in decoder.modules()):
        return False
    return not any(
        type(weight).__name__ == "DTensor" or hasattr(weight, "ds_id") for weight in decoder.parameters()
    )
