"""Passes of a decoder over columns that come in portions, with a cache or by reading all of them again."""

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

#: Rotary frequencies that change with the length, and would differ between the keys of one cache.
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


class Passes:
    """Feeds a decoder one portion of columns after the other.

    Args:
        decoder: The wrapped backbone.
        past: The columns it has seen, which grows.
        cache: Keys and values of these; None to read them all again with every portion, as gradient
            checkpointing needs: it drops a cache.
        context: Positions that a column sees at most.
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
        """Feed ``columns`` columns, a pass for each portion of them; without a cache, in one portion.

        Args:
            portions: Embeddings [B, c, E] and which of them hold something, [B, c].
            columns: Sum of their c.
        """
        joined: tuple[Tensor, ...] = ()
        start = 0
        self._last_column = self.past.columns + columns
        for embeddings, valid in portions:
            result = self._pass(embeddings, valid)
            if valid.shape[1] == columns:
                joined = result
                break
            # Filled as it comes: joining the portions at the end would hold them twice.
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
        """Final-norm states at ``columns`` [B, n] of this call, on the CPU; zeros where -1."""
        return self._at(columns, 0)

    def layers(self, columns: Tensor) -> tuple[Tensor, ...]:
        """The states of every layer at ``columns``, if the options ask for them."""
        return tuple(self._at(columns, index) for index in range(1, len(self._results[0])))

    def _at(self, columns: Tensor, index: int) -> Tensor:
        parts = [result[index] for result in self._results]
        # What lies before the first column asked for need not be copied: in generation, the prompt.
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
        self._refuse_local(config)
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
        """On a CPU, the mask of a portion behind others, a view of one that serves all portions.

        512 columns that see 65,536, one head, one core: transformers' booleans take 143 ms to build, and 199
        ms to attend through in each layer; through numbers it takes 65 ms. GPUs build masks in no time, and
        their kernels have rules about how a view lies in memory.
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

    def _refuse_local(self, config: PretrainedConfig) -> None:
        """Layers with a window of their own count empty columns as if they held something."""
        width = _local_window(config)
        if self.past.holes and width is not None and self.past.columns > width:
            raise InputError(
                f"layers of this {config.model_type} model see {width} positions only, which soft tokens for "
                "some samples of a batch would take from the others: use batches of one sample"
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
            f"tokens and soft tokens pass the context of {config.max_position_embeddings} positions, and "
            f"those of this {config.model_type} model cannot slide: shorten the prompt or the answer"
        )


def reads_in_portions(decoder: nn.Module) -> bool:
    """Whether several passes over a prefix compute what one does, and no other process waits for one.

    Not so with rotary frequencies that change with the length. And where processes share out the weights
    (FSDP, DeepSpeed's ZeRO-3), as many passes as this process's prefix needs may be more than another's.
    """
    rope = getattr(decoder.config, "rope_parameters", None) or {}
    # Either one set of parameters, or one for each type of layer.
    sets = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    if any(parameters.get("rope_type") in _LENGTH_DEPENDENT_ROPE for parameters in sets):
        return False
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in decoder.modules()):
        return False
    return not any(
        type(weight).__name__ == "DTensor" or hasattr(weight, "ds_id") for weight in decoder.parameters()
    )
