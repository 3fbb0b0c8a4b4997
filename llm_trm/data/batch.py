"""Sequences that grow together: a key-value cache whose rows come and go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from transformers import DynamicCache


@dataclass
class Row:
    """A problem under way.

    Attributes:
        index: Of the problem.
        prompt: Token ids.
        context_length: How many of them stand before ``<think>``.
        written: Tokens written up to ``</think>``.
        thinking_from: Where in ``written`` the thinking begins, behind ``<think>``; None before that.
        context: States before ``<think>``, in pieces ``[k, D]``.
        thought: Whether ``</think>`` was written.
        post, next_token, response: As in :class:`llm_trm.data.decoding.Thought`.
    """

    index: int
    prompt: Sequence[int]
    context_length: int
    written: list[int] = field(default_factory=list)
    thinking_from: int | None = field(init=False)
    context: list[Tensor] = field(default_factory=list)
    thought: bool = False
    post: Tensor | None = None
    next_token: int = -1
    response: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.thinking_from = 0 if self.context_length < len(self.prompt) else None

    @property
    def length(self) -> int:
        """Tokens read and written."""
        return len(self.prompt) + len(self.written) + len(self.response)

    def is_finite(self) -> bool:
        """Whether the states that were kept hold no NaN and no infinity."""
        kept = [*self.context, *([] if self.post is None else [self.post])]
        return all(bool(torch.isfinite(states).all()) for states in kept)


@dataclass
class Batch:
    """Rows, what the model remembers of them, and the token that it is to read next.

    Attributes:
        rows: B problems.
        cache: Keys and values ``[B, heads, K, head size]`` of every layer, the last position at the end.
        mask: ``[B, K + 1]``, 1 where a row has a token, the next one included.
        lengths: ``[B]``, ones of the mask.
        tokens: ``[B]``, the next ones.
    """

    rows: list[Row]
    cache: DynamicCache
    mask: Tensor
    lengths: Tensor
    tokens: Tensor

    def feed(self, tokens: Tensor) -> None:
        """Make ``tokens`` ``[B]`` the next ones; the cache has the previous ones by now."""
        self.mask = functional.pad(self.mask, (0, 1), value=1)
        self.lengths = self.lengths + 1
        self.tokens = tokens

    def keep(self, places: list[int]) -> None:
        """Drop all rows but those at ``places``, and the columns that are padding in every row left."""
        self.rows = [self.rows[place] for place in places]
        index = torch.tensor(places, device=self.mask.device)
        padding = self.mask.shape[1] - max(row.length for row in self.rows)
        for layer in _layers(self.cache):
            layer.keys = layer.keys[index, :, padding:]
            layer.values = layer.values[index, :, padding:]
        self.mask = self.mask[index, padding:]
        self.lengths, self.tokens = self.lengths[index], self.tokens[index]

    def join(self, other: Batch) -> None:
        """Take the rows of ``other`` in, the shorter of the two padded on the left."""
        mine = max(other.mask.shape[1] - self.mask.shape[1], 0)
        theirs = max(self.mask.shape[1] - other.mask.shape[1], 0)

        def joined(a: Tensor, b: Tensor) -> Tensor:
            return torch.cat([functional.pad(a, (0, 0, mine, 0)), functional.pad(b, (0, 0, theirs, 0))])

        for layer, entering in zip(_layers(self.cache), _layers(other.cache), strict=True):
            layer.keys = joined(layer.keys, entering.keys)
            layer.values = joined(layer.values, entering.values)
        self.mask = joined(self.mask[:, :, None], other.mask[:, :, None])[:, :, 0]
        self.rows = self.rows + other.rows
        self.lengths = torch.cat([self.lengths, other.lengths])
        self.tokens = torch.cat([self.tokens, other.tokens])


def _layers(cache: DynamicCache) -> list[Any]:
    # Typed as Any: transformers' own annotation allows for layers that have neither keys nor values.
    return list(cache.layers)
