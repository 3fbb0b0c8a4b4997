"""The cache of a decoder with soft tokens, and the past that a later ``<think>`` reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from llm_trm.errors import InputError


class Past:
    """The columns that a decoder has seen.

    Attributes:
        valid: Which columns contain a token or a soft token, bool [B, C].
        floor: The oldest position that each column sees, [B, C].
        dropped: Number of positions that recursions have dropped, [B].
        states: Final-norm states of the columns from ``gone`` on, in tensors [B, c, D].
        gone: Number of leading columns whose states no recursion will read again.
        steps: Supervision steps of each round of recursions, int32 [B], 0 for samples without one.
        gaps: Whether any column may be empty, including padding of the prompt.
        holes: Whether any column after a sample's first token may be empty.
        drops: Whether a recursion has dropped positions.
    """

    def __init__(self, batch: int, device: torch.device) -> None:
        self.valid = torch.zeros(batch, 0, dtype=torch.bool, device=device)
        self.floor = torch.zeros(batch, 0, dtype=torch.long, device=device)
        self.dropped = torch.zeros(batch, dtype=torch.long, device=device)
        self.states: list[Tensor] = []
        self.steps: list[Tensor] = []
        self.gone = 0
        self.gaps = self.holes = self.drops = False

    @property
    def columns(self) -> int:
        """C."""
        return self.valid.shape[1]

    @property
    def positions(self) -> Tensor:
        """Position of each column among the valid ones of its sample, 0 before the first, [B, C]."""
        return (self.valid.long().cumsum(1) - 1).clamp(min=0)

    def append(self, valid: Tensor, context: int | None) -> Tensor:
        """Add columns and return their positions [B, c].

        Args:
            valid: Which of them are not empty, bool [B, c].
            context: Maximum number of positions that a column sees, itself included; None for all.
        """
        self.valid = torch.cat((self.valid, valid), dim=1)
        positions = self.positions[:, self.columns - valid.shape[1] :]
        floor = self.dropped[:, None].expand_as(positions)
        if context is not None:
            floor = torch.maximum(floor, positions - (context - 1))
        self.floor = torch.cat((self.floor, floor), dim=1)
        return positions

    def visible(self, columns: int) -> Tensor:
        """Which columns the last of the first ``columns`` sees, bool [B, columns]."""
        oldest = self.floor[:, columns - 1 : columns]
        return self.valid[:, :columns] & (self.positions[:, :columns] >= oldest)

    def join_states(self, oldest: Tensor) -> Tensor:
        """Return the states of the columns from ``gone`` on, [B, c, D], and discard all older ones.

        Args:
            oldest: The oldest position that later recursions of each sample read, [B].
        """
        unread = ~(self.valid & (self.positions >= oldest[:, None])).any(0)
        # Keep one column even if all are padding.
        gone = min(int(unread.long().cumprod(0).sum()), self.columns - 1)
        states = self.states[0] if len(self.states) == 1 else torch.cat(self.states, dim=1)
        if gone > self.gone:
            # Copy, because a view would keep the discarded states alive.
            states = states[:, gone - self.gone :].clone()
            self.gone = gone
        self.states = [states]
        return states

    def transform(self, rows: Callable[[Tensor], Tensor]) -> None:
        """Apply ``rows``, which selects or repeats samples, to all tensors."""
        self.valid, self.floor, self.dropped = rows(self.valid), rows(self.floor), rows(self.dropped)
        self.states = [rows(states) for states in self.states]
        self.steps = [rows(steps) for steps in self.steps]


class TRMCache(Cache):
    """Keys and values of tokens and soft tokens, whose length counts tokens only.

    Generation need not know about soft tokens: its masks, positions and lengths are those of the tokens it
    wrote. Samples can be reordered, repeated and selected, as in beam search. Positions cannot be cropped,
    because the soft tokens after a cropped ``<think>`` would remain.

    Args:
        decoder: An empty cache of the wrapped decoder.
    """

    def __init__(self, decoder: Cache) -> None:
        super().__init__(layers=decoder.layers)
        self.decoder = decoder
        self.tokens = 0
        self.past: Past | None = None

    @property
    def steps(self) -> Tensor | None:
        """Supervision steps of each recursion so far, int32 [B, rounds], 0 for samples without one."""
        if self.past is None or not self.past.steps:
            return None
        return torch.stack(self.past.steps, dim=1)

    @property
    def is_croppable(self) -> bool:
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens seen, excluding soft tokens."""
        return self.tokens

    def crop(self, tokens_to_remove: int) -> None:
        """Reject cropping.

        Raises:
            InputError: ``tokens_to_remove`` is not 0.
        """
        if tokens_to_remove:
            raise InputError(
                "a cache with soft tokens cannot be cropped, which assisted generation needs: generate "
                "without an assistant, or with use_trm=False"
            )

    def reset(self) -> None:
        """Empty the cache."""
        self.decoder.reset()
        self.tokens, self.past = 0, None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """See :meth:`Cache.reorder_cache`."""
        self.decoder.reorder_cache(beam_idx)
        self._transform(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """See :meth:`Cache.batch_repeat_interleave`."""
        self.decoder.batch_repeat_interleave(repeats)
        self._transform(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """See :meth:`Cache.batch_select_indices`."""
        self.decoder.batch_select_indices(indices)
        self._transform(lambda tensor: tensor[indices])

    def _transform(self, rows: Callable[[Tensor], Tensor]) -> None:
        if self.past is not None:
            self.past.transform(rows)


def trm_cache(given: Any) -> TRMCache:
    """Wrap ``given`` as the cache of a model with a recursion.

    Raises:
        InputError: ``given`` contains tokens that were read without the recursion, or cannot grow.
    """
    if isinstance(given, TRMCache):
        return given
    if given.get_seq_length():
        raise InputError(
            "this cache was filled without the recursion, which reads the states before <think>: continue "
            "with use_trm=False, or start with an empty cache"
        )
    if type(given).__name__ != "DynamicCache":
        raise InputError(
            f"a {type(given).__name__} cannot grow to hold soft tokens: use the "
            "default cache (cache_implementation 'dynamic' or 'offloaded')"
        )
    return TRMCache(given)
