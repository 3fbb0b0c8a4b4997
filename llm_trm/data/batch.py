"""A batch of growing sequences with a key-value cache, whose rows can be added and removed."""

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
    """A problem in progress.

    Attributes:
        index: Index of the problem.
        prompt: Token ids.
        context_length: Number of prompt tokens before ``<think>``.
        written: Generated tokens up to ``</think>``.
        thinking_from: Index in ``written`` of the first token after ``<think>``; None before that.
        context: States before ``<think>``, in chunks ``[k, D]``.
        thought: Whether ``</think>`` was generated.
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
        """Number of tokens read and generated."""
        return len(self.prompt) + len(self.written) + len(self.response)

    def is_finite(self) -> bool:
        """Whether all stored states are finite."""
        kept = [*self.context, *([] if self.post is None else [self.post])]
        return all(bool(torch.isfinite(states).all()) for states in kept)


@dataclass
class Batch:
    """Rows, their key-value cache, and the next token of each.

    Attributes:
        rows: B problems.
        cache: Keys and values ``[B, heads, K, head size]`` of every layer, padded on the left.
        mask: ``[B, K + 1]``, 1 where a row has a token, including the next one.
        lengths: ``[B]``, number of ones in the mask.
        tokens: ``[B]``, the next tokens.
    """

    rows: list[Row]
    cache: DynamicCache
    mask: Tensor
    lengths: Tensor
    tokens: Tensor

    def feed(self, tokens: Tensor) -> None:
        """Set the next tokens to ``tokens`` ``[B]``; the cache already contains the previous ones."""
        self.mask = functional.pad(self.mask, (0, 1), value=1)
        self.lengths = self.lengths + 1
        self.tokens = tokens

    def keep(self, indices: list[int]) -> None:
        """Keep only the rows at ``indices``, and drop columns that are padding in all of them."""
        self.rows = [self.rows[index] for index in indices]
        selected = torch.tensor(indices, device=self.mask.device)
        padding = self.mask.shape[1] - max(row.length for row in self.rows)
        for layer in _layers(self.cache):
            layer.keys = layer.keys[selected, :, padding:]
            layer.values = layer.values[selected, :, padding:]
        self.mask = self.mask[selected, padding:]
        self.lengths, self.tokens = self.lengths[selected], self.tokens[selected]

    def join(self, other: Batch) -> None:
        """Add the rows of ``other``, padding the shorter batch on the left."""
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
    # Any, because transformers' annotation includes layers without keys and values.
    return list(cache.layers)
