"""The two sublayers of a block, ``h + second(f(first(norm(h))))``: what forward and backward share.

Precision: operands of every GEMM are in ``operand``; the residual stream stays in the dtype of x, which
under autocast is float32. A norm is folded into the next weights only where the stream itself can be the
operand: not under a wider residual, and not in float16, whose range neither the unnormalised stream (over
65504) nor the folded weights (products under 6e-5) need respect. There a row kernel applies it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trm_kernels.ops.attention import NO_DROPOUT, Dropout, attention_backward
from trm_kernels.ops.gemm import fold, gemm
from trm_kernels.ops.norm import add_rms_norm, rms_norm_backward
from trm_kernels.ops.tiles import Activation


@dataclass(frozen=True)
class SublayerLayout:
    """How one sublayer's parameters lie in the flat list: [norm] first... [bias] second [bias]."""

    weights: int = 1
    biases: bool = False
    tokens: bool = False
    activation: Activation = Activation.NONE


@dataclass(frozen=True)
class Layout:
    """A family of block, as the kernels see it."""

    pre_norm: bool
    mixer: SublayerLayout
    mlp: SublayerLayout


LAYOUTS = {
    "seed": Layout(
        True, SublayerLayout(biases=True), SublayerLayout(biases=True, activation=Activation.GELU)
    ),
    "scratch": Layout(
        True, SublayerLayout(weights=3), SublayerLayout(weights=2, activation=Activation.SWIGLU)
    ),
    "scratch-tokens": Layout(
        True,
        SublayerLayout(biases=True, tokens=True, activation=Activation.GELU),
        SublayerLayout(weights=2, activation=Activation.SWIGLU),
    ),
    "paper": Layout(False, SublayerLayout(), SublayerLayout(activation=Activation.SWIGLU)),
    "paper-tokens": Layout(
        False,
        SublayerLayout(tokens=True, activation=Activation.SWIGLU),
        SublayerLayout(activation=Activation.SWIGLU),
    ),
}
_DERIVATIVE = {Activation.GELU: Activation.GELU_BACKWARD, Activation.SWIGLU: Activation.SWIGLU_BACKWARD}


@dataclass
class Sublayer:
    """Parameters of one sublayer, or their gradients."""

    layout: SublayerLayout
    norm: Tensor | None
    first: tuple[Tensor, ...]
    first_bias: Tensor | None
    second: Tensor
    second_bias: Tensor | None

    def flat(self) -> list[Tensor]:
        """The tensors in the order that :func:`unpack` reads them."""
        values = [getattr(self, field.name) for field in fields(self)[1:]]
        flat: list[Tensor] = []
        for value in values:
            flat.extend(value if isinstance(value, tuple) else [] if value is None else [value])
        return flat

    def stacked(self, dtype: torch.dtype) -> Tensor:
        """The first weights as one [N, K] in ``dtype``."""
        if len(self.first) == 1:
            return self.first[0].to(dtype)
        return torch.cat([weight.to(dtype) for weight in self.first])


def unpack_sublayer(layout: Layout, part: SublayerLayout, parameters: Iterator[Tensor]) -> Sublayer:
    """Take one sublayer's tensors off the front of a flat list."""

    def vector() -> Tensor:
        return next(parameters).contiguous()  # matrices are read with their strides, vectors are not

    return Sublayer(
        part,
        vector() if layout.pre_norm else None,
        tuple(next(parameters) for _ in range(part.weights)),
        vector() if part.biases else None,
        next(parameters),
        vector() if part.biases else None,
    )


def unpack(layout: Layout, parameters: list[Tensor]) -> tuple[Sublayer, Sublayer]:
    """Mixer and MLP from the flat list of a block's parameters."""
    remaining = iter(parameters)
    return (
        unpack_sublayer(layout, layout.mixer, remaining),
        unpack_sublayer(layout, layout.mlp, remaining),
    )


@dataclass(frozen=True)
class Call:
    """What every step of one call reads."""

    layout: Layout
    eps: float
    operand: torch.dtype
    residual: torch.dtype
    mask: Tensor | None = None  # contiguous uint8 [B, L]
    n_heads: int = 1
    ends: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    dropout: Dropout = NO_DROPOUT

    @property
    def folding(self) -> bool:
        """Whether norms along the width are folded into the next weights, from row sums left behind."""
        return self.layout.pre_norm and self.operand == self.residual != torch.float16

    def folds(self, sublayer: Sublayer) -> bool:
        """Whether the sublayer's norm is folded into its first weights."""
        return self.folding and not sublayer.layout.tokens

    def axis(self, sublayer: Sublayer) -> int:
        """Axis of the sublayer's norm."""
        return 1 if sublayer.layout.tokens and not self.layout.pre_norm else -1

    def incoming(self, grad: Tensor) -> Tensor:
        """An output's gradient, contiguous, in the residual's dtype, and zero at masked rows."""
        if self.mask is not None:
            grad = grad.masked_fill(self.mask[..., None] == 0, 0.0)
        return grad.to(self.residual).contiguous()

    @property
    def attention(self) -> tuple[Any, ...]:
        return self.n_heads, self.mask, self.ends, self.cos, self.sin, self.dropout


def _aligned(weight: Tensor) -> Tensor:
    """``weight`` [N, K] with rows that start at multiples of 16 elements.

    A token mixer's K is the sequence length. Compiled for sm_90, rows of 97 elements are loaded without
    asynchronous copies, and every product waits for them.
    """
    return F.pad(weight, (0, -weight.shape[1] % 16))[:, : weight.shape[1]]


def first_half(
    call: Call, sublayer: Sublayer, h: Tensor, sumsq: Tensor | None, save: bool
) -> tuple[Tensor, Tensor | None]:
    """``f(first(norm(h)))`` and, if ``save``, the pre-activations."""
    scale: dict[str, Any] = {}
    if call.folds(sublayer):
        assert sublayer.norm is not None
        weight = fold(sublayer.first, sublayer.norm, call.operand)
        if sumsq is None:
            _, _, sumsq = add_rms_norm(h, eps=call.eps, write_out=False, write_sumsq=True)
        scale = {"sumsq": sumsq, "eps": call.eps}
    else:
        weight = sublayer.stacked(call.operand)
        if sublayer.layout.tokens:
            weight = _aligned(weight)
        if sublayer.norm is None:
            h = h.to(call.operand)
        else:
            _, normed, _ = add_rms_norm(h, weight=sublayer.norm, eps=call.eps, out_dtype=call.operand)
            assert normed is not None
            h = normed
    out, pre, _ = gemm(
        h,
        weight,
        out_dtype=call.operand,
        bias=sublayer.first_bias,
        activation=sublayer.layout.activation,
        save_pre=save and sublayer.layout.activation != Activation.NONE,
        transposed=sublayer.layout.tokens,
        **scale,
    )
    return out, pre


def second_half(
    call: Call, sublayer: Sublayer, inner: Tensor, h: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``h + second(inner)``, normalised if post-norm: the output, its row sums, and what was normalised."""
    pre_norm = call.layout.pre_norm
    out, _, sumsq = gemm(
        inner,
        sublayer.second.to(call.operand),
        out_dtype=call.residual,
        bias=sublayer.second_bias,
        residual=h,
        mask=mask if pre_norm else None,
        write_sumsq=call.folds(sublayer),
        transposed=sublayer.layout.tokens,
    )
    if pre_norm:
        return out, sumsq, None
    _, normed, _ = add_rms_norm(
        out, mask=mask, eps=call.eps, axis=call.axis(sublayer), out_dtype=call.residual
    )
    assert normed is not None
    return normed, None, out


def _weight_gradient(grad: Tensor, a: Tensor, tokens: bool) -> Tensor:
    """Gradient of a weight [N, K] from its output's [B, L, N] and its input [B, L, K]."""
    if tokens:  # [B, N, D] and [B, K, D]
        return torch.einsum("bnd,bkd->nk", grad, a)
    return grad.flatten(0, 1).t() @ a.flatten(0, 1)


def _bias_gradient(grad: Tensor, bias: Tensor | None, tokens: bool) -> Tensor | None:
    if bias is None:
        return None
    wide = torch.promote_types(grad.dtype, torch.float32)
    return grad.sum((0, 2) if tokens else (0, 1), dtype=wide).to(bias.dtype)


def _input_gradient(grad: Tensor, weight: Tensor, tokens: bool) -> Tensor:
    """Gradient of a linear map's input, in the dtype of ``grad``."""
    # Detached: matmul copies a broadcast operand that requires a gradient.
    return weight.detach().t() @ grad if tokens else grad @ weight


def _first_gradients(sublayer: Sublayer, grad: Tensor, a: Tensor) -> tuple[Tensor, ...]:
    """Gradients of the first weights from those of their stacked output and their input."""
    stacked = _weight_gradient(grad, a, sublayer.layout.tokens)
    parts = stacked.split([weight.shape[0] for weight in sublayer.first])
    # Clones: an op's results may not be views of one another.
    clone = len(parts) > 1
    return tuple(
        (part.clone() if clone else part).to(weight.dtype)
        for part, weight in zip(parts, sublayer.first, strict=True)
    )


def sublayer_backward(
    call: Call, sublayer: Sublayer, grad: Tensor, h: Tensor, normed_sum: Tensor | None, saved: list[Tensor]
) -> tuple[Tensor, Sublayer]:
    """Back through ``h + second(f(first(norm(h))))``, or ``norm(h + second(f(first(h))))``.

    Args:
        grad: Gradient of the sublayer's output [B, L, D], residual dtype.
        h: Input of the sublayer [B, L, D].
        normed_sum: What a post-norm sublayer normalised [B, L, D].
        saved: ``[qkv, attention output, log-sum-exp]``, or ``[pre-activations]``.

    Returns:
        Gradient of h, and those of the sublayer's parameters.
    """
    tokens = sublayer.layout.tokens
    if normed_sum is not None:
        grad, _, _ = rms_norm_backward(grad, normed_sum, None, None, eps=call.eps, axis=call.axis(sublayer))
    grad_out = grad.to(call.operand)
    second = sublayer.second.to(call.operand)
    if sublayer.layout.activation == Activation.NONE:
        qkv, inner, lse = saved
        grad_inner = _input_gradient(grad_out, second, tokens)
        grad_first = attention_backward(grad_inner, qkv, inner, lse, *call.attention)
    else:
        grad_first, activated, _ = gemm(
            grad_out,
            second.t(),
            out_dtype=call.operand,
            activation=_DERIVATIVE[sublayer.layout.activation],
            pre=saved[0],
            transposed=tokens,
        )
        assert activated is not None
        inner = activated
    grad_normed = _input_gradient(grad_first, sublayer.stacked(call.operand), tokens)

    grad_norm = None
    if sublayer.norm is None:
        grad_h = grad + grad_normed
        a = h.to(call.operand)
    else:
        grad_h, grad_norm, normed = rms_norm_backward(
            grad_normed, h, sublayer.norm, residual=grad, eps=call.eps, normed_dtype=call.operand
        )
        assert normed is not None
        a = normed
    gradients = Sublayer(
        sublayer.layout,
        grad_norm,
        _first_gradients(sublayer, grad_first, a),
        _bias_gradient(grad_first, sublayer.first_bias, tokens),
        _weight_gradient(grad_out, inner, tokens).to(sublayer.second.dtype),
        _bias_gradient(grad_out, sublayer.second_bias, tokens),
    )
    return grad_h, gradients
