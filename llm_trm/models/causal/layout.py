"""Where the tokens of a batch go when soft tokens stand behind every ``<think>``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The columns that a batch of n tokens becomes: segments, with K columns of soft tokens between them.

    A segment ends at a ``<think>`` of the samples that have one there. Samples that have none left fill the
    columns that the others need, so that soft tokens cost them no more than K empty columns.

    Attributes:
        segments: Indices into the n tokens, -1 where a sample has none, [B, w] each, on the CPU.
        thinking: For each segment but the last, which samples end it with ``<think>``, bool [B].
        outputs: The column that each token's output is read at, [B, n]: its own, or behind ``<think>`` that
            of the last soft token; -1 at padding.
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
    """That of tokens without a ``<think>``: the columns are the tokens, padding included."""
    columns = torch.arange(valid.shape[1]).expand(valid.shape)
    columns = columns.masked_fill(~valid, -1)
    return Layout([columns], [], columns)


def lay_out(valid: Tensor, think: Tensor, soft_tokens: int, thoughts: int = 0) -> Layout:
    """Place a batch.

    Args:
        valid: Which of the n tokens are no padding, bool [B, n], on the CPU.
        think: Which are ``<think>``, bool [B, n].
        soft_tokens: K.
        thoughts: Rounds of soft tokens at least, even where no sample has that many ``<think>``.
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
        # A pass needs a column even where there is nothing but padding.
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
