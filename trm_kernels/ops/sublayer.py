"""The forward halves of a sublayer, ``h + second(f(first(norm(h))))``.

Precision: operands of every GEMM are in ``operand``; the residual stream stays in the dtype of x, which
under autocast is float32. A folded norm then reads a rounded copy of the stream, which the kernel that wrote
the stream left beside it; where norms are not folded (:func:`~trm_kernels.ops.layouts.folds`) a row kernel
applies them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trm_kernels.ops.attention_common import Dropout, Heads, Samples
from trm_kernels.ops.gemm import WHOLE_ROW, gemm
from trm_kernels.ops.layouts import Layout, Sublayer
from trm_kernels.ops.norm import add_rms_norm
from trm_kernels.ops.quantise import quantise_rows
from trm_kernels.ops.stream import Norm, Stream, start
from trm_kernels.ops.tiles import Activation

#: Where the tensors of one call of one block are kept for the backward, by name; empty where nothing is.
Slot = Mapping[str, Tensor]


@dataclass(frozen=True)
class Call:
    """What every step of a recursion reads.

    Attributes:
        layout: The family of block.
        eps: Of the blocks' norms.
        operand: Dtype of the GEMMs' operands.
        residual: Dtype of the residual stream.
        samples: How rows divide into samples.
        n_heads: Attention heads.
        cos, sin: RoPE tables.
        dropout: Probability of dropping an attention weight.
        seed: Its device seed, int64 [1].
        output_norm: Applied after every network call.
        deferred: Whether a post-norm sublayer leaves its sum as it is, with the sums of squares of its rows:
            the products behind it then scale their rows, and the residual, instead of a row kernel. Without
            gradient only, as the backward reads the normalised streams.
    """

    layout: Layout
    eps: float
    operand: torch.dtype
    residual: torch.dtype
    samples: Samples
    n_heads: int = 1
    cos: Tensor | None = None
    sin: Tensor | None = None
    dropout: float = 0.0
    seed: Tensor | None = None
    output_norm: Norm | None = None
    deferred: bool = False

    def axis(self, sublayer: Sublayer) -> int:
        """Axis of the sublayer's norm."""
        return 1 if sublayer.layout.tokens and not self.layout.pre_norm else -1

    def heads(self, mixer: Sublayer, call: int) -> Heads:
        """Attention of the ``call``-th block call of a recursion."""
        dropout = Dropout(self.dropout, self.seed, call)
        return Heads(self.n_heads, self.samples, self.cos, self.sin, mixer.first_bias, dropout)

    def rounds(self, reader: Sublayer | None) -> torch.dtype | None:
        """The dtype of the copy that ``reader`` needs of a stream, or None if it reads the stream itself."""
        copied = reader is not None and reader.folded and self.operand != self.residual
        return self.operand if copied else None

    def written(self, reader: Sublayer | None, slot: Slot, key: str) -> dict[str, Any]:
        """What a kernel that writes the stream of ``reader`` writes, and where, as arguments."""
        folded = reader is not None and reader.folded
        copied = self.rounds(reader)
        return {
            "next": slot.get(key) if copied is None else None,
            "copy": slot.get(key) if copied is not None else None,
            "write_copy": copied,
            "write_sumsq": folded,
            "out_sumsq": slot.get(f"{key}.sumsq"),
        }


def normed_operand(call: Call, sublayer: Sublayer, stream: Stream) -> Tensor:
    """What the first GEMM of an unfolded sublayer multiplies, [B, L, D]."""
    if sublayer.norm is None:
        return stream.value.to(call.operand)
    _, normed, _ = add_rms_norm(
        stream.value, weight=sublayer.norm, eps=call.eps, count=call.samples.count, out_dtype=call.operand
    )
    assert normed is not None
    return normed


def _quantised(
    call: Call, rows: Tensor, scales: Tensor | None, eps: float | None = None
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """The left operand of a GEMM, and the scales of both where the matrix is in fp8."""
    if scales is None:
        return rows, None
    quantised, of_rows = quantise_rows(rows, eps=eps, count=call.samples.count)
    return quantised, (of_rows, scales)


def _first_operand(
    call: Call, sublayer: Sublayer, stream: Stream
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """The normalised stream as the first GEMM reads it; where the norm is folded, not yet normalised."""
    deferred = sublayer.norm is None and stream.sumsq is not None
    if sublayer.first_scales is not None:
        eps = call.eps if deferred or sublayer.norm is not None else None
        return _quantised(call, stream.value, sublayer.first_scales, eps)
    if sublayer.folded or deferred:
        return stream.operand, None
    return normed_operand(call, sublayer, stream), None


def first_half(call: Call, sublayer: Sublayer, stream: Stream, pre: Tensor | None, *, save: bool) -> Tensor:
    """``f(first(norm(h)))``; the pre-activations go to ``pre``, or are not kept if ``save`` is False.

    An attention's projections, which have no activation here, come without their bias.
    """
    assert sublayer.first_matrix is not None
    activation = sublayer.layout.activation
    operand, scales = _first_operand(call, sublayer, stream)
    product = gemm(
        operand,
        sublayer.first_matrix,
        scales=scales,
        out_dtype=call.operand,
        bias=None if activation == Activation.NONE else sublayer.first_bias,
        activation=activation,
        sumsq=None if scales is not None else stream.sumsq,
        eps=call.eps,
        count=call.samples.count,
        transposed=sublayer.layout.tokens,
        save_pre=save and activation != Activation.NONE,
        pre=pre if activation != Activation.NONE else None,
        out=pre if activation == Activation.NONE else None,
    )
    assert product.out is not None
    return product.out


def pre_activations(call: Call, sublayer: Sublayer, stream: Stream) -> Tensor:
    """The pre-activations of a first half again, without the bias."""
    assert sublayer.first_matrix is not None
    product = gemm(
        stream.operand if sublayer.folded else normed_operand(call, sublayer, stream),
        sublayer.first_matrix,
        out_dtype=call.operand,
        sumsq=stream.sumsq if sublayer.folded else None,
        eps=call.eps,
        count=call.samples.count,
        transposed=sublayer.layout.tokens,
    )
    assert product.out is not None
    return product.out


def _second_product(
    call: Call, sublayer: Sublayer, inner: Tensor, stream: Stream
) -> tuple[Tensor, dict[str, Any]]:
    """The left operand of the second GEMM, and what it adds, as arguments."""
    inner, scales = _quantised(call, inner, sublayer.second_scales)
    return inner, {
        "scales": scales,
        "out_dtype": call.residual,
        "bias": sublayer.second_bias,
        "residual": stream.value,
        # Behind a norm that was deferred the residual is normalised here; a folded one leaves it as it is.
        "residual_sumsq": None if call.layout.pre_norm else stream.sumsq,
        "eps": call.eps,
        "count": call.samples.count,
        "transposed": sublayer.layout.tokens,
    }


def second_half(
    call: Call,
    sublayer: Sublayer,
    inner: Tensor,
    stream: Stream,
    slot: Slot,
    reader: Sublayer,
    reader_slot: Slot,
    reader_key: str,
    *,
    mask: Tensor | None = None,
) -> Stream:
    """``h + second(inner)``, normalised if post-norm: the stream that ``reader`` goes on with."""
    assert sublayer.second_matrix is not None
    written = call.written(reader, reader_slot, reader_key)
    place = written.pop("next")
    inner, common = _second_product(call, sublayer, inner, stream)
    if call.layout.pre_norm:
        product = gemm(inner, sublayer.second_matrix, **common, mask=mask, out=place, **written)
        assert product.out is not None
        return Stream(product.out, product.copy, product.sumsq)
    if call.deferred:
        copied = call.operand if call.operand != call.residual and reader.first_scales is None else None
        product = gemm(inner, sublayer.second_matrix, **common, write_copy=copied, write_sumsq=True)
        assert product.out is not None
        return Stream(product.out, product.copy, product.sumsq)
    if sublayer.layout.tokens and "sum" not in slot and sublayer.second_matrix.shape[0] <= WHOLE_ROW:
        product = gemm(inner, sublayer.second_matrix, **common, normalise=True, out=place)
        assert product.out is not None
        return Stream(product.out)
    product = gemm(inner, sublayer.second_matrix, **common, out=slot.get("sum"))
    assert product.out is not None
    _, normed, _ = add_rms_norm(
        product.out,
        mask=mask,
        eps=call.eps,
        axis=call.axis(sublayer),
        count=call.samples.count,
        out=place,
    )
    assert normed is not None
    return Stream(normed)


def last_half(
    call: Call,
    sublayer: Sublayer,
    inner: Tensor,
    stream: Stream,
    slot: Slot,
    *,
    addend: Tensor | None,
    keep: bool,
    mask: Tensor | None,
    reader: Sublayer | None,
    reader_slot: Slot,
) -> tuple[Tensor | None, Stream | None]:
    """The end of a network call: its output, and the stream of the next call, which adds ``addend`` to it.

    Args:
        addend: x + y, or y before the answer's update; None after it.
        keep: Whether the output is wanted beside the next stream.
        reader, reader_slot: First sublayer of the next call, and where its stream is kept.
    """
    assert sublayer.second_matrix is not None
    inner, common = _second_product(call, sublayer, inner, stream)
    written = call.written(reader, reader_slot, "in") if addend is not None else {}
    norm = call.output_norm if call.layout.pre_norm else Norm(None, call.eps)
    if norm is None:
        product = gemm(
            inner, sublayer.second_matrix, **common, mask=mask, addend=addend, keep=keep, **written
        )
        following = None if product.next is None else Stream(product.next, product.copy, product.sumsq)
        return product.out, following
    product = gemm(inner, sublayer.second_matrix, **common, out=slot.get("sum"))
    assert product.out is not None
    if mask is not None:
        _, normed, _ = add_rms_norm(product.out, weight=norm.weight, mask=mask, eps=norm.eps)
        return normed, None
    following, _, normed = start(
        None,
        addend,
        product.out,
        norm=norm,
        write_normed=keep,
        write_next=addend is not None,
        count=call.samples.count,
        **written,
    )
    return normed, following
