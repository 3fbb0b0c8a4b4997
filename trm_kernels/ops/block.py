"""A whole transformer block, forward and backward, behind one autograd boundary.

A block is two sublayers, the mixer and the MLP. Kernels of a pre-norm block with attention:

    1. QKV GEMM, its epilogue applying the row scale of the norm that is folded into the weights
    2. attention
    3. output GEMM + bias + residual, leaving the row sums of squares for the next norm
    4. first MLP GEMM, with the row scale, bias and activation
    5. second MLP GEMM + bias + residual, leaving the row sums for the next block

and one that folds each norm's weight. In float16 and under autocast (:mod:`trm_kernels.ops.sublayer` says
why) a row kernel applies each norm instead. The weightless norms of a post-norm block follow the residual,
where the row's scale is not yet known in the epilogue: they take a row kernel each. So do norms along
another axis than the next contraction's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trm_kernels.ops._library import define, first_order
from trm_kernels.ops.attention import Dropout, attention_forward, mask_ends
from trm_kernels.ops.gemm import sumsq_parts
from trm_kernels.ops.norm import add_rms_norm
from trm_kernels.ops.sublayer import (
    LAYOUTS,
    Call,
    first_half,
    second_half,
    sublayer_backward,
    unpack,
)


def _forward(
    call: Call, parameters: list[Tensor], x: Tensor, sumsq: Tensor | None, save: bool
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """The block's output, its row sums of squares, and the tensors that the backward needs."""
    mixer, mlp = unpack(call.layout, parameters)
    saved: list[Tensor | None] = []
    inner, pre = first_half(call, mixer, x, sumsq, save)
    if mixer.layout.tokens:
        saved += [pre]
    else:
        qkv = inner
        inner, lse = attention_forward(qkv, *call.attention)
        saved += [qkv, inner, lse]
    h, sumsq, unnormed = second_half(call, mixer, inner, x, None)
    saved += [h if call.layout.pre_norm else unnormed]
    inner, pre = first_half(call, mlp, h, sumsq, save)
    saved += [pre]
    out, sumsq, unnormed = second_half(call, mlp, inner, h, call.mask)
    if not call.layout.pre_norm:
        saved += [unnormed]
    return out, sumsq, [tensor for tensor in saved if tensor is not None] if save else []


def _backward(
    call: Call, parameters: list[Tensor], grad: Tensor, x: Tensor, saved: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of the block's input and of its parameters."""
    mixer, mlp = unpack(call.layout, parameters)
    grad = call.incoming(grad)
    split = 1 if mixer.layout.tokens else 3
    of_mixer, (h, pre, *rest) = saved[:split], saved[split:]
    mixer_sum = mlp_sum = None
    if not call.layout.pre_norm:
        mixer_sum, mlp_sum = h, rest[0]
        _, normed, _ = add_rms_norm(mixer_sum, eps=call.eps, axis=call.axis(mixer))
        assert normed is not None
        h = normed
    grad, mlp_gradients = sublayer_backward(call, mlp, grad, h, mlp_sum, [pre])
    grad, mixer_gradients = sublayer_backward(call, mixer, grad, x, mixer_sum, of_mixer)
    return grad, mixer_gradients.flat() + mlp_gradients.flat()


_ARGUMENTS = (
    "Tensor x, Tensor? sumsq, Tensor[] parameters, Tensor? mask, Tensor? ends, Tensor? cos, Tensor? sin, "
    "Tensor? seed, str layout, int n_heads, float eps, float dropout, ScalarType operand"
)


def _call(
    x: Tensor,
    mask: Tensor | None,
    ends: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    seed: Tensor | None,
    layout: str,
    n_heads: int,
    eps: float,
    dropout: float,
    operand: torch.dtype,
) -> Call:
    if mask is not None:
        mask = mask.contiguous()
        ends = mask_ends(mask) if ends is None else ends
    return Call(
        LAYOUTS[layout],
        eps,
        operand,
        residual=x.dtype,
        mask=mask,
        n_heads=n_heads,
        ends=ends,
        cos=cos,
        sin=sin,
        dropout=Dropout(dropout, seed),
    )


def _block(x: Tensor, sumsq: Tensor | None, parameters: list[Tensor], *rest: Any) -> tuple[Tensor, Tensor]:
    out, row_sums, _ = _forward(_call(x, *rest), parameters, x.contiguous(), sumsq, save=False)
    return out, x.new_empty(0) if row_sums is None else row_sums


def _block_saving(
    x: Tensor, sumsq: Tensor | None, parameters: list[Tensor], *rest: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    out, row_sums, saved = _forward(_call(x, *rest), parameters, x.contiguous(), sumsq, save=True)
    return out, x.new_empty(0) if row_sums is None else row_sums, saved


def _block_backward(
    grad: Tensor, saved: list[Tensor], x: Tensor, parameters: list[Tensor], *rest: Any
) -> list[Tensor]:
    grad_x, gradients = _backward(_call(x, *rest), parameters, grad, x.contiguous(), saved)
    return [grad_x, *gradients]


def _row_sums_fake(x: Tensor, call: Call) -> Tensor:
    if not call.folding:
        return x.new_empty(0)
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty((x.shape[0] * x.shape[1], sumsq_parts(x.shape[2])), dtype=wide)


def _block_fake(
    x: Tensor, sumsq: Tensor | None, parameters: list[Tensor], *rest: Any
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _row_sums_fake(x, _call(x, *rest))


def _block_saving_fake(
    x: Tensor, sumsq: Tensor | None, parameters: list[Tensor], *rest: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    call = _call(x, *rest)
    layout, operand = call.layout, call.operand
    mixer, mlp = unpack(layout, parameters)
    batch, length, width = x.shape
    saved: list[Tensor] = []
    if layout.mixer.tokens:
        rows = sum(weight.shape[0] for weight in mixer.first)
        saved += [x.new_empty((batch, rows, width), dtype=operand)]
    else:
        wide = torch.promote_types(operand, torch.float32)
        saved += [
            x.new_empty((batch, length, 3 * width), dtype=operand),
            x.new_empty((batch, length, width), dtype=operand),
            x.new_empty((batch, call.n_heads, length), dtype=wide),
        ]
    rows = sum(weight.shape[0] for weight in mlp.first)
    saved += [x.new_empty(x.shape), x.new_empty((batch, length, rows), dtype=operand)]
    if not layout.pre_norm:
        saved += [x.new_empty(x.shape)]
    return x.new_empty(x.shape), _row_sums_fake(x, call), saved


def _block_backward_fake(
    grad: Tensor, saved: list[Tensor], x: Tensor, parameters: list[Tensor], *rest: Any
) -> list[Tensor]:
    # Contiguous, whatever the strides of the parameters: so are the matrix products that give them.
    return [x.new_empty(x.shape), *(parameter.new_empty(parameter.shape) for parameter in parameters)]


class _Block(torch.autograd.Function):
    """The one autograd boundary of a block."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sumsq: Tensor | None, count: int, *rest: Any) -> tuple[Tensor, Tensor]:
        parameters, (mask, ends, cos, sin, seed, *static) = list(rest[:count]), rest[count:]
        out, row_sums, saved = block_saving(x, sumsq, parameters, mask, ends, cos, sin, seed, *static)
        ctx.save_for_backward(x, mask, ends, cos, sin, seed, *parameters, *saved)
        ctx.count, ctx.static = count, static
        ctx.mark_non_differentiable(row_sums)
        return out, row_sums

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, mask, ends, cos, sin, seed, *tensors = ctx.saved_tensors
        parameters, saved = tensors[: ctx.count], tensors[ctx.count :]
        grad_x, *gradients = block_backward(
            grad, saved, x, parameters, mask, ends, cos, sin, seed, *ctx.static
        )
        return grad_x, None, None, *gradients, *([None] * (5 + len(ctx.static)))


def _block_differentiable(
    x: Tensor, sumsq: Tensor | None, parameters: list[Tensor], *rest: Any
) -> tuple[Tensor, Tensor]:
    return _Block.apply(x, sumsq, len(parameters), *parameters, *rest)


block_saving = define(
    "block_saving",
    f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor[])",
    _block_saving,
    _block_saving_fake,
)
block_backward = define(
    "block_backward",
    f"(Tensor grad, Tensor[] saved, {_ARGUMENTS.replace('Tensor? sumsq, ', '')}) -> Tensor[]",
    _block_backward,
    _block_backward_fake,
)
#: ``block(x, sumsq, parameters, mask, ends, cos, sin, seed, layout, n_heads, eps, dropout, operand)`` gives
#: the block's output [B, L, D] and the partial sums of squares [B L, parts] of its rows, which the next
#: block takes as ``sumsq`` (empty where norms are not folded). ``parameters`` follow
#: :class:`~trm_kernels.ops.sublayer.SublayerLayout`; ``mask``, ``ends``, ``cos``,
#: ``sin`` are as for :func:`~trm_kernels.ops.attention.attention_forward`; ``operand`` is the GEMMs' dtype.
block = define("block", f"({_ARGUMENTS}) -> (Tensor, Tensor)", _block, _block_fake, _block_differentiable)
