"""Lays out a batch in columns, with soft tokens after every ``<think>``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The columns of a batch of n tokens: segments, separated by K columns of soft tokens.

    A segment ends at ``<think>`` for the samples that have another one. The other samples continue in the
    columns that these need, so soft tokens cost them at most K empty columns.

    Attributes:
        segments: Indices into the n tokens, -1 where a sample has none, [B, w] each, on the CPU.
        thinking: For each segment except the last, which samples end it with ``<think>``, bool [B].
        outputs: The column of each token's output, [B, n]: the token's own column, or for ``<think>`` the
            column of its last soft token; -1 at padding.
    """

    segments: list[Tensor]
    thinking: list[Tensor]
    outputs: Tensor

    @property
    def gaps(self) -> bool:
        """Whether any column is empty for some sample."""
        full = all(bool((segment >= 0).all()) for segment in self.segments)
        return not full or not all(bool(here.all()) for here in self.thinking)


def plain_layout(valid: Tensor) -> Layout:
    """The layout of tokens without ``<think>``: one column per token, padding included."""
    columns = torch.arange(valid.shape[1]).expand(valid.shape)
    columns = columns.masked_fill(~valid, -1)
    return Layout([columns], [], columns)


def lay_out(valid: Tensor, think: Tensor, soft_tokens: int, thoughts: int = 0) -> Layout:
    """Lay out a batch.

    Args:
        valid: Which of the n tokens are not padding, bool [B, n], on the CPU.
        think: Which tokens are ``<think>``, bool [B, n].
        soft_tokens: Number of soft tokens K.
        thoughts: Minimum number of rounds of soft tokens, even if no sample has that many ``<think>``.
    """
    rows = [row.nonzero().squeeze(1) for row in valid]
    ends = [(flags[row].nonzero().squeeze(1) + 1).tolist() for row, flags in zip(rows, think, strict=True)]
    rounds = max(thoughts, *(len(of_row) for of_row in ends))
    if rounds == 0:
        return plain_layout(valid)
    outputs = torch.full(valid.shape, -1)
    placed = [0] * len(rows)
    segments, thinking = [], []
    column = 0
    for index in range(rounds + 1):
        here = torch.tensor([index < len(of_row) for of_row in ends])
        wanted = [
            (of_row[index] if index < len(of_row) else len(row)) - start
            for row, of_row, start in zip(rows, ends, placed, strict=True)
        ]
        pacing = [width for width, ending in zip(wanted, here.tolist(), strict=True) if ending] or wanted
        # A pass needs at least one column, even if all are padding.
        width = max(*pacing, 1 if index == 0 else 0, 0)
        segment = torch.full((len(rows), width), -1)
        for number, (row, count) in enumerate(zip(rows, wanted, strict=True)):
            taken = row[placed[number] : placed[number] + min(count, width)]
            segment[number, : len(taken)] = taken
            outputs[number, taken] = torch.arange(column, column + len(taken))
            placed[number] += len(taken)
        column += width
        segments.append(segment)
        if index < rounds:
            thinking.append(here)
            column += soft_tokens
            for number in here.nonzero().squeeze(1).tolist():
                outputs[number, rows[number][placed[number] - 1]] = column - 1
    return Layout(segments, thinking, outputs)
