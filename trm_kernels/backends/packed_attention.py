"""Attention of the ``eager`` backend over packed rows, sorted by the length of their sample.

Shapes: R rows, D width, H heads, E head size; S samples of one length l, N = S H, w = max(l, 16).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from trm_kernels import reference

#: Sequences up to this length keep their attention weights for the backward (:class:`_ShortSequences`).
_SHORT = 96
#: torch's softmax over fewer than 16 elements uses scalar code: 5.3 ms for 1,024 x 14 x 14 floats, compared
#: to 0.6 ms for 1,024 x 16 x 16 (one core, AVX-512). Shorter rows of scores are therefore padded to 16 with
#: -inf.
_MIN_WIDTH = 16

Groups = Sequence[tuple[int, int]]


class PackedAttention:
    """Softmax attention within each sample, on rows [R, 3 D] of queries, keys and values.

    Args:
        groups: Consecutive pairs (S, l): S samples of length l, with l ascending.
        n_heads: H.
        rotary: RoPE tables of the rows' positions, each [R, E/2].
    """

    def __init__(self, groups: Groups, n_heads: int, rotary: reference.RotaryTables | None) -> None:
        self.groups, self.n_heads = groups, n_heads
        self.rotary: reference.RotaryTables | None = None
        if rotary is not None:
            cos, sin = rotary
            self.rotary = cos[:, None, None], sin[:, None, None]  # for heads [R, 2, H, E]
        short = sum(length <= _SHORT for _, length in groups)
        self._long = groups[short:]
        self._short = _ShortSequences(groups[:short], n_heads) if short else None

    def __call__(self, qkv: Tensor, dropout: float) -> Tensor:
        """Compute the attention output [R, D]. ``dropout`` is the probability of dropping a weight."""
        if self.rotary is not None:
            heads = qkv.view(len(qkv), 3, self.n_heads, -1)
            rotated = reference.apply_rotary(heads[:, :2], self.rotary)
            qkv = torch.cat((rotated, heads[:, 2:]), dim=1).view(qkv.shape)
        # In low precision, use torch's kernel, which keeps the scores in float32.
        wide = qkv.device.type == "cpu" and qkv.dtype in (torch.float32, torch.float64)
        if self._short is None or dropout > 0.0 or not wide:
            return self._group_by_group(qkv, self.groups, dropout)
        if not self._long:
            return _ShortAttention.apply(qkv, self._short)
        short, long = qkv.split([self._short.rows, len(qkv) - self._short.rows])
        attended = _ShortAttention.apply(short, self._short)
        return torch.cat((attended, self._group_by_group(long, self._long, 0.0)))

    def _group_by_group(self, qkv: Tensor, groups: Groups, dropout: float) -> Tensor:
        outs, sizes = [], [samples * length for samples, length in groups]
        for rows, (samples, length) in zip(qkv.split(sizes), groups, strict=True):
            heads = (samples, length, 3, self.n_heads, -1)
            q, k, v = rows.view(heads).permute(2, 0, 3, 1, 4)  # each [S, H, l, E]
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
            outs.append(out.transpose(1, 2).reshape(len(rows), -1))
        return torch.cat(outs)


class _ShortSequences:
    """Indices with which :class:`_ShortAttention` gathers the heads of its rows, and scatters them back.

    Each group has queries [N, l, E], then keys and values, each [N, w, E]. Batched products of contiguous
    matrices with one softmax are 1.8 times as fast as torch's CPU kernel for sequences of 8 to 20 (forward
    and backward, one core), which runs small products one by one. Beyond l, keys and values repeat the last.

    Attributes:
        rows: Number of rows R.
        shapes: (N, l, w) of each group.
        sizes: Sizes of queries, keys and values of each group, in heads of rows.
        gather_qkv: Index of a row's head in [R, 3, H], for each gathered head.
        scatter_qkv: Index among the gathered heads, for each head of a row, [3 R H].
        gather_out: Index of a row's head in [R, H], for each head of the queries.
        scatter_out: Index among the queries, for each head of a row, [R H].
    """

    def __init__(self, groups: Groups, n_heads: int) -> None:
        self.shapes, self.sizes, gather_qkv, valid, gather_out = [], [], [], [], []
        first, head = 0, torch.arange(n_heads)[:, None]
        for samples, length in groups:
            width = max(length, _MIN_WIDTH)
            self.shapes.append((samples * n_heads, length, width))
            self.sizes += [samples * n_heads * extent for extent in (length, width, width)]
            sample = first + length * torch.arange(samples)[:, None, None]  # [S, 1, 1]
            for part, extent in enumerate((length, width, width)):
                position = torch.arange(extent)
                row = sample + position.clamp(max=length - 1)  # [S, 1, extent]
                gather_qkv.append(((3 * row + part) * n_heads + head).flatten())
                valid.append((position < length).expand(samples, n_heads, extent).flatten())
            gather_out.append(((sample + torch.arange(length)) * n_heads + head).flatten())
            first += samples * length
        self.rows = first
        self.gather_qkv, self.gather_out = torch.cat(gather_qkv), torch.cat(gather_out)
        indices = torch.cat(valid).nonzero()[:, 0]
        self.scatter_qkv = torch.empty_like(indices).scatter_(0, self.gather_qkv[indices], indices)
        self.scatter_out = torch.argsort(self.gather_out)
        self.n_heads = n_heads


class _ShortAttention(torch.autograd.Function):
    """Attention that saves its weights, group by group; without dropout."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, plan: _ShortSequences) -> Tensor:
        heads = qkv.reshape(3 * plan.n_heads * plan.rows, -1).index_select(0, plan.gather_qkv)
        size = heads.shape[1]
        out = heads.new_empty(len(plan.gather_out), size)
        keeps, kept = ctx.needs_input_grad[0], []
        parts = iter(heads.split(plan.sizes))
        for (count, length, width), attended in zip(plan.shapes, out.split(plan.sizes[::3]), strict=True):
            q, k, v = (next(parts).view(count, -1, size) for _ in range(3))
            bias = heads.new_zeros(1, 1, width)
            bias[..., length:] = -torch.inf
            beta = 1.0 if width > length else 0.0
            scores = torch.baddbmm(bias, q, k.transpose(1, 2), beta=beta, alpha=size**-0.5)  # [N, l, w]
            weights = scores.softmax(-1)
            torch.bmm(weights, v, out=attended.view(count, length, size))
            if keeps:
                kept.append(weights)
        ctx.plan = plan
        ctx.save_for_backward(heads, *kept)
        return out.index_select(0, plan.scatter_out).view(len(qkv), -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        plan: _ShortSequences = ctx.plan
        heads, *kept = ctx.saved_tensors
        size = heads.shape[1]
        out = torch.empty_like(heads)
        nothing = heads.new_empty(())
        grads = grad.reshape(len(plan.gather_out), size).index_select(0, plan.gather_out)
        out_grads, parts, part_grads = (
            iter(tensor.split(sizes))
            for tensor, sizes in (
                (grads, plan.sizes[::3]),
                (heads, plan.sizes),
                (out, plan.sizes),
            )
        )
        for (count, _, _), weights in zip(plan.shapes, kept, strict=True):
            q, k, v = (next(parts).view(count, -1, size) for _ in range(3))
            dq, dk, dv = (next(part_grads).view(count, -1, size) for _ in range(3))
            dout = next(out_grads).view(count, -1, size)
            torch.bmm(weights.transpose(1, 2), dout, out=dv)
            dweights = torch.bmm(dout, v.transpose(1, 2))  # [N, l, w]
            dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
            torch.baddbmm(nothing, dscores, k, beta=0.0, alpha=size**-0.5, out=dq)
            torch.baddbmm(nothing, dscores.transpose(1, 2), q, beta=0.0, alpha=size**-0.5, out=dk)
        return out.index_select(0, plan.scatter_qkv).view(len(grad), -1), None
