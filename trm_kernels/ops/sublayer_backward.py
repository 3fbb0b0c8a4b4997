"""Backward of one sublayer: the gradient of its input, and the operands of its weight gradients.

The backward of a folded norm needs no separate pass. With s = 1 / rms(h), dY the gradient of the first GEMM's
output, G = s dY and Y that output without its bias,

    dh    = G (w * W) - h s^2 dot / D + residual      dot = sum_n dY_n Y_n, from the kernel that wrote G
    d(wW) = G^T h,  dW = d(wW) * w,  dw = sum_n d(wW)_n W_n

so the weight gradient reads the stream itself instead of its normalised form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trm_kernels.ops.activation_gradient import activation_gradient
from trm_kernels.ops.attention_backward import attention_backward
from trm_kernels.ops.gemm import NormGradient, Outputs, Residual, gemm
from trm_kernels.ops.layouts import Sublayer
from trm_kernels.ops.norm import add_rms_norm, rms_norm_backward
from trm_kernels.ops.stream import Stream
from trm_kernels.ops.sublayer import Call, Slot, pre_activations
from trm_kernels.ops.tiles import Activation
from trm_kernels.ops.weight_gradient import ColumnSum, WeightGradient

#: ``allocate(name, shape, dtype)`` returns memory for one tensor of this network call.
Allocate = Callable[[str, tuple[int, ...], torch.dtype], Tensor]


class SublayerGradient:
    """Float32 gradients of one sublayer's parameters, summed over the network calls of a recursion."""

    def __init__(self, sublayer: Sublayer, count: Tensor | None) -> None:
        self.sublayer = sublayer
        self.first, self.second = WeightGradient(count), WeightGradient(count)
        self.first_bias, self.second_bias = ColumnSum(count), ColumnSum(count)
        self._norm: Tensor | None = None

    def add_norm(self, grad: Tensor) -> None:
        """Add the gradient [D] of an unfolded norm's weight."""
        wide = torch.promote_types(grad.dtype, torch.float32)
        self._norm = grad.to(wide) if self._norm is None else self._norm + grad

    def add(self, g: Tensor, a: Tensor, grad: Tensor, inner: Tensor, rows: int) -> None:
        """Add the weight gradients of one network call, or of several stacked calls.

        Args:
            g, a: Gradient of the first GEMM's output, and its input.
            grad, inner: Gradient of the second GEMM's output, and its input.
            rows: Number of rows of one network call: B L, or R for packed samples.
        """
        tokens = self.sublayer.layout.tokens

        def by_step(matrix: Tensor) -> Tensor:
            return matrix if tokens else matrix.reshape(-1, rows, matrix.shape[-1])

        self.first.add(by_step(g), by_step(a), transposed=tokens)
        self.second.add(by_step(grad), by_step(inner), transposed=tokens)
        if self.sublayer.second_bias is None:
            return
        if tokens:
            self.second_bias.add_total(grad.sum((0, 2), dtype=torch.promote_types(grad.dtype, torch.float32)))
        else:
            self.second_bias.add(by_step(grad))

    def totals(self) -> list[Tensor]:
        """Return gradients in the order of the sublayer's flat parameter list, in the parameters' dtypes."""
        sublayer = self.sublayer
        first = self.first.total
        flat: list[Tensor] = []
        if sublayer.norm is not None:
            if sublayer.folded:
                wide = [weight.to(first.dtype) for weight in sublayer.first]
                stacked = wide[0] if len(wide) == 1 else torch.cat(wide)
                self._norm = (first * stacked).sum(0)
                first = first * sublayer.norm.to(first.dtype)
            assert self._norm is not None
            flat.append(self._norm.to(sublayer.norm.dtype))
        parts = first.split([weight.shape[0] for weight in sublayer.first])
        # Copies, because the results of an op must not be views of each other.
        flat += [
            torch.empty_like(weight, memory_format=torch.contiguous_format).copy_(part)
            for part, weight in zip(parts, sublayer.first, strict=True)
        ]
        if sublayer.first_bias is not None:
            flat.append(self.first_bias.total.to(sublayer.first_bias.dtype))
        flat.append(self.second.total.to(sublayer.second.dtype))
        if sublayer.second_bias is not None:
            flat.append(self.second_bias.total.to(sublayer.second_bias.dtype))
        return flat


@dataclass
class Products:
    """Operands of one sublayer's weight gradients in one network call; each matrix is [rows, ...]."""

    g: Tensor  # gradient of the first GEMM's output, divided by rms(h) if the norm is folded
    a: Tensor | None  # input of the first GEMM; None: the saved stream
    grad: Tensor  # gradient of the second GEMM's output
    inner: Tensor | None  # input of the second GEMM; None: the saved attention output


def back_linear(call: Call, grad: Tensor, weight: Tensor, *, tokens: bool) -> Tensor:
    """Compute the gradient of a linear layer's input, in the dtype of ``grad``; ``weight`` is [N, K]."""
    # Detached, because matmul copies a broadcast operand that requires a gradient.
    weight = weight.detach()
    if tokens:
        return weight.t() @ grad
    if call.samples.count is None:
        return grad @ weight
    product = gemm(grad, weight.t(), out_dtype=grad.dtype, count=call.samples.count)
    assert product.out is not None
    return product.out


def back_second(
    call: Call,
    sublayer: Sublayer,
    grad: Tensor,
    heads_call: int,
    slot: Slot,
    stream: Stream,
    allocate: Allocate,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Backward through the second GEMM and the activation or attention before it.

    Returns:
        G [B, L, N], the partial dots, the activation (None for attention), and the gradient of the first
        bias.
    """
    assert sublayer.second_matrix is not None and sublayer.first_matrix is not None
    tokens = sublayer.layout.tokens
    sumsq = stream.sumsq if sublayer.folded else None
    if sublayer.layout.activation == Activation.NONE:
        back = attention_backward(
            back_linear(call, grad, sublayer.second_matrix, tokens=tokens),
            slot["qkv"],
            slot["attention"],
            slot["lse"],
            call.heads(sublayer, heads_call),
            sumsq=sumsq,
            eps=call.eps,
            grad_qkv=allocate("g", tuple(slot["qkv"].shape), call.operand),
        )
        return back.qkv, back.dots, None, back.bias
    pre = slot.get("mixer.pre" if tokens else "mlp.pre")
    if pre is None:
        pre = pre_activations(call, sublayer, stream)
    batch, length, _ = grad.shape
    inner = sublayer.second_matrix.shape[1]
    shape = (batch, inner, grad.shape[2]) if tokens else (batch, length, inner)
    activation = activation_gradient(
        grad,
        sublayer.second_matrix,
        pre,
        activation=sublayer.layout.activation,
        bias=sublayer.first_bias,
        sumsq=sumsq,
        eps=call.eps,
        count=call.samples.count,
        transposed=tokens,
        g=allocate("g", tuple(pre.shape), call.operand),
        act=allocate("inner", shape, call.operand),
    )
    return activation.g, activation.dots, activation.act, activation.bias


def sublayer_backward(
    call: Call,
    sublayer: Sublayer,
    grad: Stream,
    heads_call: int,
    slot: Slot,
    stream: Stream,
    gradient: SublayerGradient,
    allocate: Allocate,
    *,
    out: Tensor | None = None,
    copy: Tensor | None = None,
    write_copy: bool = False,
) -> tuple[Stream, Products]:
    """Backward through ``h + second(f(first(norm(h))))``, or ``norm(h + second(f(first(h))))``.

    Args:
        grad: Gradient of the sublayer's output in the residual dtype, with its copy in the operand dtype if
            there is one.
        heads_call: Index of the block call, a counter of the dropout.
        slot: Tensors that the forward of the block saved.
        stream: The input h.
        gradient: Accumulates the gradients of biases and of an unfolded norm.
        allocate: Allocates G and the activation.
        out, copy: Output tensors for the gradient of h and its copy; allocated if None.
        write_copy: Whether a folded sublayer also writes the copy.

    Returns:
        The gradient of h, and the operands of the weight gradients.
    """
    assert sublayer.first_matrix is not None
    tokens, count = sublayer.layout.tokens, call.samples.count
    value = grad.value
    if not call.layout.pre_norm:
        value, _, _ = rms_norm_backward(
            value,
            slot["mixer.sum" if sublayer.layout == call.layout.mixer else "mlp.sum"],
            None,
            None,
            eps=call.eps,
            axis=call.axis(sublayer),
            count=count,
        )
        grad = Stream(value)
    operand = grad.operand.to(call.operand)
    g, dots, inner, grad_bias = back_second(call, sublayer, operand, heads_call, slot, stream, allocate)
    if grad_bias is not None:
        gradient.first_bias.add_total(grad_bias)
    if sublayer.folded:
        assert dots is not None and stream.sumsq is not None
        product = gemm(
            g,
            sublayer.first_matrix.t(),
            out_dtype=call.residual,
            norm=NormGradient(stream.sumsq, call.eps, stream.operand, dots),
            residual=Residual(value),
            count=count,
            outputs=Outputs(out=out, copy=copy, copy_dtype=call.operand if write_copy else None),
        )
        assert product.out is not None
        return Stream(product.out, product.copy), Products(g, None, operand, inner)
    back = back_linear(call, g, sublayer.first_matrix, tokens=tokens)
    if sublayer.norm is None:
        grad_h = torch.add(value, back, out=out) if out is not None else value + back
        a = stream.value.to(call.operand)
    else:
        grad_h, grad_norm, normed = rms_norm_backward(
            back,
            stream.value,
            sublayer.norm,
            residual=value,
            eps=call.eps,
            count=count,
            normed_dtype=call.operand,
            grad_h=out,
        )
        assert normed is not None and grad_norm is not None
        a = normed
        gradient.add_norm(grad_norm)
    return Stream(grad_h), Products(g, a, operand, inner)


def middle_stream(call: Call, mixer: Sublayer, slot: Slot) -> Stream:
    """Return the input of a block's MLP: the saved stream, or a norm recomputed from the saved sum."""
    if call.layout.pre_norm:
        return Stream(slot["middle"], sumsq=slot.get("middle.sumsq"))
    _, normed, _ = add_rms_norm(
        slot["mixer.sum"], eps=call.eps, axis=call.axis(mixer), count=call.samples.count
    )
    assert normed is not None
    return Stream(normed)
