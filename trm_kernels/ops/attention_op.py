"""Attention as a separate op: ``torch.ops.trm_kernels.attention``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trm_kernels.first_order import first_order
from trm_kernels.ops._library import define
from trm_kernels.ops.attention import attention_forward
from trm_kernels.ops.attention_backward import attention_backward
from trm_kernels.ops.attention_common import Dropout, Heads, Samples, mask_ends


def _heads(
    qkv: Tensor,
    n_heads: int,
    mask: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> Heads:
    batch, length, _ = qkv.shape
    mask, cos, sin = (None if tensor is None else tensor.contiguous() for tensor in (mask, cos, sin))
    ends = None if mask is None else mask_ends(mask)
    return Heads(n_heads, Samples(batch, length, mask, ends), cos, sin, dropout=Dropout(dropout, seed))


def _attention_saving(
    qkv: Tensor,
    n_heads: int,
    mask: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, length, width = qkv.shape
    if width % (3 * n_heads):
        raise ValueError(f"expected packed projections [B, L, 3 D] of {n_heads} heads, got {list(qkv.shape)}")
    if mask is not None and mask.shape != (batch, length):
        raise ValueError(f"expected a mask {[batch, length]}, got {list(mask.shape)}")
    tables = (length, width // (6 * n_heads))
    if cos is not None and (sin is None or cos.shape != tables or sin.shape != tables):
        raise ValueError(f"expected two RoPE tables {list(tables)}")
    if dropout > 0.0 and seed is None:
        raise ValueError("dropout needs a seed, a one-element int64 tensor")
    return attention_forward(qkv.contiguous(), _heads(qkv, n_heads, mask, cos, sin, dropout, seed))


def _attention(*arguments: Any) -> Tensor:
    return _attention_saving(*arguments)[0]


def _attention_backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    n_heads: int,
    mask: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> Tensor:
    heads = _heads(qkv, n_heads, mask, cos, sin, dropout, seed)
    return attention_backward(grad.contiguous(), qkv.contiguous(), out, lse, heads).qkv


def _attention_fake(qkv: Tensor, *rest: Any) -> Tensor:
    batch, length, width = qkv.shape
    return qkv.new_empty((batch, length, width // 3))


def _attention_saving_fake(qkv: Tensor, n_heads: int, *rest: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(qkv.dtype, torch.float32)
    return _attention_fake(qkv), qkv.new_empty((n_heads, qkv.shape[0] * qkv.shape[1]), dtype=wide)


def _attention_backward_fake(grad: Tensor, qkv: Tensor, *rest: Any) -> Tensor:
    return qkv.new_empty(qkv.shape)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, n_heads: int, *rest: Any) -> Tensor:
        out, lse = attention_saving(qkv, n_heads, *rest)
        mask, cos, sin, dropout, seed = rest
        ctx.save_for_backward(qkv, out, lse, mask, cos, sin, seed)
        ctx.n_heads, ctx.dropout = n_heads, dropout
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, out, lse, mask, cos, sin, seed = ctx.saved_tensors
        grad_qkv = attention_gradient(grad, qkv, out, lse, ctx.n_heads, mask, cos, sin, ctx.dropout, seed)
        return grad_qkv, None, None, None, None, None, None


_ARGUMENTS = "int n_heads, Tensor? mask, Tensor? cos, Tensor? sin, float dropout, Tensor? seed"
attention_saving = define(
    "attention_saving",
    f"(Tensor qkv, {_ARGUMENTS}) -> (Tensor, Tensor)",
    _attention_saving,
    _attention_saving_fake,
)
attention_gradient = define(
    "attention_backward",
    f"(Tensor grad, Tensor qkv, Tensor out, Tensor lse, {_ARGUMENTS}) -> Tensor",
    _attention_backward,
    _attention_backward_fake,
)
#: ``attention(qkv, n_heads, mask, cos, sin, dropout, seed)`` on packed projections [B, L, 3 D] returns
#: [B, L, D]. The mask uint8 [B, L], tables [L, E/2] and seed int64 [1] are optional.
attention = define(
    "attention",
    f"(Tensor qkv, {_ARGUMENTS}) -> Tensor",
    _attention,
    _attention_fake,
    _Attention.apply,
)
