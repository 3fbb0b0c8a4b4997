"""A whole transformer block, forward and backward, behind one autograd boundary.

A block is two sublayers, the mixer and the MLP, each ``second(f(first(.)))`` around a residual. Kernels of
a pre-norm block with attention:

    1. QKV GEMM, its epilogue applying the row scale of the norm that is folded into the weights
    2. attention
    3. output GEMM + bias + residual, leaving the row sums of squares for the next norm
    4. first MLP GEMM, with the row scale, bias and activation
    5. second MLP GEMM + bias + residual, leaving the row sums for the next block

The weightless norms of a post-norm block follow the residual, where the row's scale is not yet known in
the epilogue: they take a row kernel each. So do norms along another axis than the next contraction's.

Precision: operands of every GEMM are in ``operand``; the residual stream stays in the dtype of x, which
under autocast is float32. With float16 operands under a float32 residual the norm is applied before the
operand is rounded, because an unnormalised stream may pass 65504.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trm_kernels.ops._library import define
from trm_kernels.ops.attention import Dropout, attention_backward, attention_forward
from trm_kernels.ops.gemm import Activation, fold, gemm, sumsq_parts
from trm_kernels.ops.norm import add_rms_norm, rms_norm_backward


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
_BACKWARD = {Activation.GELU: Activation.GELU_BACKWARD, Activation.SWIGLU: Activation.SWIGLU_BACKWARD}


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
        """The tensors in the order that :func:`_unpack` read them."""
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


def _unpack(layout: Layout, parameters: list[Tensor]) -> tuple[Sublayer, Sublayer]:
    remaining = iter(parameters)

    def sublayer(part: SublayerLayout) -> Sublayer:
        return Sublayer(
            part,
            next(remaining) if layout.pre_norm else None,
            tuple(next(remaining) for _ in range(part.weights)),
            next(remaining) if part.biases else None,
            next(remaining),
            next(remaining) if part.biases else None,
        )

    return sublayer(layout.mixer), sublayer(layout.mlp)


@dataclass(frozen=True)
class _Call:
    """What every step of one call reads."""

    layout: Layout
    n_heads: int
    eps: float
    operand: torch.dtype
    residual: torch.dtype
    mask: Tensor | None
    ends: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    dropout: Dropout

    def folds(self, sublayer: Sublayer) -> bool:
        """Whether the sublayer's norm is folded into its first weights."""
        overflows = self.operand == torch.float16 and self.residual == torch.float32
        return sublayer.norm is not None and not sublayer.layout.tokens and not overflows

    def axis(self, sublayer: Sublayer) -> int:
        """Axis of the sublayer's norm."""
        return 1 if sublayer.layout.tokens and not self.layout.pre_norm else -1

    @property
    def attention(self) -> tuple[Any, ...]:
        return self.n_heads, self.mask, self.ends, self.cos, self.sin, self.dropout


def _first(
    call: _Call, sublayer: Sublayer, h: Tensor, sumsq: Tensor | None, save: bool
) -> tuple[Tensor, Tensor | None]:
    """``f(first(norm(h)))`` and, if ``save``, the pre-activations."""
    scale: dict[str, Any] = {}
    if call.folds(sublayer):
        assert sublayer.norm is not None
        weight = fold(sublayer.first, sublayer.norm, call.operand)
        if sumsq is None:
            _, _, sumsq = add_rms_norm(h, eps=call.eps, write_out=False, write_sumsq=True)
        scale = {"sumsq": sumsq, "norm_dim": h.shape[-1], "eps": call.eps}
    else:
        weight = sublayer.stacked(call.operand)
        if sublayer.norm is not None:
            _, normed, _ = add_rms_norm(h, weight=sublayer.norm, eps=call.eps, out_dtype=call.operand)
            assert normed is not None
            h = normed
    out, pre, _ = gemm(
        h,
        weight,
        operand=call.operand,
        out_dtype=call.operand,
        bias=sublayer.first_bias,
        activation=sublayer.layout.activation,
        save_pre=save and sublayer.layout.activation != Activation.NONE,
        transposed=sublayer.layout.tokens,
        **scale,
    )
    return out, pre


def _second(
    call: _Call, sublayer: Sublayer, inner: Tensor, h: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``h + second(inner)``, normalised if post-norm: the output, its row sums, and what was normalised."""
    pre_norm = call.layout.pre_norm
    out, _, sumsq = gemm(
        inner,
        sublayer.second.to(call.operand),
        operand=call.operand,
        out_dtype=call.residual,
        bias=sublayer.second_bias,
        residual=h,
        mask=mask if pre_norm else None,
        write_sumsq=pre_norm and not sublayer.layout.tokens,
        transposed=sublayer.layout.tokens,
    )
    if pre_norm:
        return out, sumsq, None
    _, normed, _ = add_rms_norm(
        out, mask=mask, eps=call.eps, axis=call.axis(sublayer), out_dtype=call.residual
    )
    assert normed is not None
    return normed, None, out


def _forward(
    call: _Call, parameters: list[Tensor], x: Tensor, sumsq: Tensor | None, save: bool
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """The block's output, its row sums of squares, and the tensors that the backward needs."""
    mixer, mlp = _unpack(call.layout, parameters)
    saved: list[Tensor | None] = []
    inner, pre = _first(call, mixer, x, sumsq, save)
    if mixer.layout.tokens:
        saved += [pre]
    else:
        qkv = inner
        inner, lse = attention_forward(qkv, *call.attention)
        saved += [qkv, inner, lse]
    h, sumsq, unnormed = _second(call, mixer, inner, x, None)
    saved += [h if call.layout.pre_norm else unnormed]
    inner, pre = _first(call, mlp, h, sumsq, save)
    saved += [pre]
    out, sumsq, unnormed = _second(call, mlp, inner, h, call.mask)
    if not call.layout.pre_norm:
        saved += [unnormed]
    return out, sumsq, [tensor for tensor in saved if tensor is not None] if save else []


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
    return weight.t() @ grad if tokens else grad @ weight


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


def _sublayer_backward(
    call: _Call, sublayer: Sublayer, grad: Tensor, h: Tensor, normed_sum: Tensor | None, saved: list[Tensor]
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
            operand=call.operand,
            out_dtype=call.operand,
            activation=_BACKWARD[sublayer.layout.activation],
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


def _backward(
    call: _Call, parameters: list[Tensor], grad: Tensor, x: Tensor, saved: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of the block's input and of its parameters."""
    mixer, mlp = _unpack(call.layout, parameters)
    if call.mask is not None:  # masked rows of the output are constant zeros
        grad = grad.masked_fill(call.mask[..., None] == 0, 0.0)
    grad = grad.to(call.residual).contiguous()
    split = 1 if mixer.layout.tokens else 3
    of_mixer, (h, pre, *rest) = saved[:split], saved[split:]
    mixer_sum = mlp_sum = None
    if not call.layout.pre_norm:
        mixer_sum, mlp_sum = h, rest[0]
        _, normed, _ = add_rms_norm(mixer_sum, eps=call.eps, axis=call.axis(mixer))
        assert normed is not None
        h = normed
    grad, mlp_gradients = _sublayer_backward(call, mlp, grad, h, mlp_sum, [pre])
    grad, mixer_gradients = _sublayer_backward(call, mixer, grad, x, mixer_sum, of_mixer)
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
) -> _Call:
    return _Call(
        LAYOUTS[layout], n_heads, eps, operand, x.dtype, mask, ends, cos, sin, Dropout(dropout, seed)
    )


def _block(
    x: Tensor, sumsq: Tensor | None, parameters: list[Tensor], *rest: Any
) -> tuple[Tensor, Tensor]:
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


def _row_sums_fake(x: Tensor, layout: Layout) -> Tensor:
    if not layout.pre_norm:
        return x.new_empty(0)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((x.shape[0] * x.shape[1], sumsq_parts(x.shape[2])), dtype=wide)


def _block_fake(
    x: Tensor, sumsq: Tensor | None, parameters: list[Tensor], *rest: Any
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _row_sums_fake(x, _call(x, *rest).layout)


def _block_saving_fake(
    x: Tensor, sumsq: Tensor | None, parameters: list[Tensor], *rest: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    call = _call(x, *rest)
    layout, operand = call.layout, call.operand
    mixer, mlp = _unpack(layout, parameters)
    batch, length, width = x.shape
    saved: list[Tensor] = []
    if layout.mixer.tokens:
        rows = sum(weight.shape[0] for weight in mixer.first)
        saved += [x.new_empty((batch, rows, width), dtype=operand)]
    else:
        wide = torch.float64 if operand == torch.float64 else torch.float32
        saved += [
            x.new_empty((batch, length, 3 * width), dtype=operand),
            x.new_empty((batch, length, width), dtype=operand),
            x.new_empty((batch, call.n_heads, length), dtype=wide),
        ]
    rows = sum(weight.shape[0] for weight in mlp.first)
    saved += [x.new_empty(x.shape), x.new_empty((batch, length, rows), dtype=operand)]
    if not layout.pre_norm:
        saved += [x.new_empty(x.shape)]
    return x.new_empty(x.shape), _row_sums_fake(x, layout), saved


def _block_backward_fake(
    grad: Tensor, saved: list[Tensor], x: Tensor, parameters: list[Tensor], *rest: Any
) -> list[Tensor]:
    return [x.new_empty(x.shape), *(torch.empty_like(parameter) for parameter in parameters)]


class _Block(torch.autograd.Function):
    """The one autograd boundary of a block."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sumsq: Tensor | None, count: int, *rest: Any) -> tuple[Tensor, Tensor]:
        parameters, (mask, ends, cos, sin, seed, *static) = list(rest[:count]), rest[count:]
        out, row_sums, saved = block_saving(
            x, sumsq, parameters, mask, ends, cos, sin, seed, *static
        )
        ctx.save_for_backward(x, mask, ends, cos, sin, seed, *parameters, *saved)
        ctx.count, ctx.static = count, static
        ctx.mark_non_differentiable(row_sums)
        return out, row_sums

    @staticmethod
    @once_differentiable
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
#: block takes as ``sumsq``. ``parameters`` follow :class:`SublayerLayout`; ``mask``, ``ends``, ``cos``,
#: ``sin`` are as for :func:`~trm_kernels.ops.attention.attention_forward`; ``operand`` is the GEMMs' dtype.
block = define(
    "block", f"({_ARGUMENTS}) -> (Tensor, Tensor)", _block, _block_fake, _block_differentiable
)
