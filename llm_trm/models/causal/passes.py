"""Passes of a decoder over columns that come in portions, with a cache or by reading all of them again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PretrainedConfig
from transformers.masking_utils import create_masks_for_generate

from llm_trm.errors import InputError
from llm_trm.models.causal.cache import Past

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

    def read(self, embeddings: Tensor, valid: Tensor) -> None:
        """Feed columns [B, c, E], of which ``valid`` [B, c] hold something."""
        positions = self.past.append(valid, self._context)
        if self._cache is None:
            self._embeddings.append(embeddings)
            self._positions.append(positions)
            embeddings, positions = torch.cat(self._embeddings, 1), torch.cat(self._positions, 1)
        output = self._decoder(
            inputs_embeds=embeddings,
            attention_mask=self._mask(embeddings),
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=self._cache is not None,
            **self._options,
        )
        result = (output.last_hidden_state, *(getattr(output, "hidden_states", None) or ()))
        if self._cache is None:
            self._results, self.past.states = [result], [output.last_hidden_state]
        else:
            self._results.append(result)
            self.past.states.append(output.last_hidden_state)

    def outputs(self, columns: Tensor) -> list[Tensor]:
        """Final-norm states, then those of every layer if asked for, at ``columns`` [B, n] of this call.

        Where ``columns`` is -1, zeros.
        """
        found = columns.clamp(min=0)[..., None]
        gone = (columns < 0)[..., None]
        together = [torch.cat(parts, dim=1) for parts in zip(*self._results, strict=True)]
        return [
            states.gather(1, found.expand(-1, -1, states.shape[-1])).masked_fill(gone, 0.0)
            for states in together
        ]

    def _mask(self, embeddings: Tensor) -> Any:
        past, config = self.past, self._decoder.config
        slides = self._context is not None and past.columns > self._context
        self._refuse_local(config)
        if not slides and not past.drops:
            return past.valid.long() if past.gaps else None
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
            past_key_values=self._cache,
            and_mask_function=sees,
        )

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
