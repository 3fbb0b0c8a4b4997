"""The two halves of a sublayer's forward, ``h + second(f(first(norm(h))))``.

Precision: all GEMM operands are in ``operand``; the residual stream stays in the dtype of x, which is float32
under autocast. A folded norm then reads a rounded copy of the stream, from the kernel that wrote the stream.
A row kernel applies norms that are not folded (:func:`~trm_kernels.ops.layouts.folds`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trm_kernels.ops.attention_common import Dropout, Heads, Samples
from trm_kernels.ops.gemm import WHOLE_ROW, FoldedNorm, Outputs, Product, Residual, gemm
from trm_kernels.ops.layouts import Layout, Sublayer
from trm_kernels.ops.norm import add_rms_norm
from trm_kernels.ops.quantise import quantise_rows
from trm_kernels.ops.stream import Norm, Stream, start
from trm_kernels.ops.tiles import Activation

#: Tensors of one block call that are saved for the backward, by name; empty if nothing is saved.
Slot = Mapping[str, Tensor]


@dataclass(frozen=True)
class Call:
    """Arguments common to all steps of a recursion.

    Attributes:
        layout: Layout of the block family.
        eps: Epsilon of the blocks' norms.
        operand: Dtype of the GEMM operands.
        residual: Dtype of the residual stream.
        samples: Division of rows into samples.
        n_heads: Number of attention heads.
        cos, sin: RoPE tables.
        dropout: Probability of dropping an attention weight.
        seed: Device seed of the dropout, int64 [1].
        output_norm: Applied after every network call.
        deferred: Whether post-norm sublayers write the unnormalised sum with the sums of squares of its rows.
            The following GEMMs then scale rows and residual instead of a row kernel. Only without gradients,
            because the backward reads the normalised streams.
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
        """Return the axis of the sublayer's norm."""
        return 1 if sublayer.layout.tokens and not self.layout.pre_norm else -1

    def heads(self, mixer: Sublayer, call: int) -> Heads:
        """Return the attention arguments for block call number ``call`` of a recursion."""
        dropout = Dropout(self.dropout, self.seed, call)
        return Heads(self.n_heads, self.samples, self.cos, self.sin, mixer.first_bias, dropout)

    def rounds(self, reader: Sublayer | None) -> torch.dtype | None:
        """Return the dtype of the stream copy for ``reader``, or None if it reads the stream itself."""
        copied = reader is not None and reader.folded and self.operand != self.residual
        return self.operand if copied else None

    def outputs(self, reader: Sublayer | None, slot: Slot, key: str) -> Outputs:
        """Return the outputs of a kernel that writes the input stream of ``reader`` as ``next``."""
        copied = self.rounds(reader)
        return Outputs(
            next=slot.get(key) if copied is None else None,
            copy=slot.get(key) if copied is not None else None,
            sumsq=slot.get(f"{key}.sumsq"),
            copy_dtype=copied,
            write_sumsq=reader is not None and reader.folded,
        )


def normed_operand(call: Call, sublayer: Sublayer, stream: Stream) -> Tensor:
    """Return the operand of an unfolded sublayer's first GEMM, [B, L, D]."""
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
    """Return the left operand of a GEMM and, if the matrix is in fp8, the scales of both operands."""
    if scales is None:
        return rows, None
    quantised, row_scales = quantise_rows(rows, eps=eps, count=call.samples.count)
    return quantised, (row_scales, scales)


def _first_operand(
    call: Call, sublayer: Sublayer, stream: Stream
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Return the operand of the first GEMM: the normalised stream, or the stream if the norm is folded."""
    deferred = sublayer.norm is None and stream.sumsq is not None
    if sublayer.first_scales is not None:
        eps = call.eps if deferred or sublayer.norm is not None else None
        return _quantised(call, stream.value, sublayer.first_scales, eps)
    if sublayer.folded or deferred:
        return stream.operand, None
    return normed_operand(call, sublayer, stream), None


def first_half(call: Call, sublayer: Sublayer, stream: Stream, pre: Tensor | None, *, save: bool) -> Tensor:
    """Compute ``f(first(norm(h)))``, and write the pre-activations to ``pre`` unless ``save`` is False.

    The projections of attention, which have no activation here, are returned without their bias.
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
        norm=None if scales is not None else _folded_norm(call, stream),
        count=call.samples.count,
        transposed=sublayer.layout.tokens,
        outputs=Outputs(out=pre) if activation == Activation.NONE else Outputs(pre=pre, save_pre=save),
    )
    assert product.out is not None
    return product.out


def pre_activations(call: Call, sublayer: Sublayer, stream: Stream) -> Tensor:
    """Recompute the pre-activations of a first half, without the bias."""
    assert sublayer.first_matrix is not None
    product = gemm(
        stream.operand if sublayer.folded else normed_operand(call, sublayer, stream),
        sublayer.first_matrix,
        out_dtype=call.operand,
        norm=_folded_norm(call, stream) if sublayer.folded else None,
        count=call.samples.count,
        transposed=sublayer.layout.tokens,
    )
    assert product.out is not None
    return product.out


def _folded_norm(call: Call, stream: Stream) -> FoldedNorm | None:
    return None if stream.sumsq is None else FoldedNorm(stream.sumsq, call.eps)


def _second_product(
    call: Call,
    sublayer: Sublayer,
    inner: Tensor,
    stream: Stream,
    outputs: Outputs,
    *,
    addend: Tensor | None = None,
    mask: Tensor | None = None,
    normalise: bool = False,
) -> Product:
    """Compute ``stream + second(inner)`` and the rest of the epilogue."""
    assert sublayer.second_matrix is not None
    inner, scales = _quantised(call, inner, sublayer.second_scales)
    # After a deferred norm the residual is normalised here; after a folded one it stays unnormalised.
    sumsq = None if call.layout.pre_norm else stream.sumsq
    return gemm(
        inner,
        sublayer.second_matrix,
        out_dtype=call.residual,
        bias=sublayer.second_bias,
        scales=scales,
        residual=Residual(stream.value, sumsq, call.eps),
        normalise=call.eps if normalise else None,
        addend=addend,
        mask=mask,
        count=call.samples.count,
        transposed=sublayer.layout.tokens,
        outputs=outputs,
    )


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
    """Compute ``h + second(inner)``, normalised if post-norm: the input stream of ``reader``."""
    assert sublayer.second_matrix is not None
    outputs = call.outputs(reader, reader_slot, reader_key)
    place = outputs.next
    if call.layout.pre_norm:
        outputs = replace(outputs, out=place, next=None)
        product = _second_product(call, sublayer, inner, stream, outputs, mask=mask)
        assert product.out is not None
        return Stream(product.out, product.copy, product.sumsq)
    if call.deferred:
        copied = call.operand if call.operand != call.residual and reader.first_scales is None else None
        outputs = Outputs(copy_dtype=copied, write_sumsq=True)
        product = _second_product(call, sublayer, inner, stream, outputs)
        assert product.out is not None
        return Stream(product.out, product.copy, product.sumsq)
    if sublayer.layout.tokens and "sum" not in slot and sublayer.second_matrix.shape[0] <= WHOLE_ROW:
        product = _second_product(call, sublayer, inner, stream, Outputs(out=place), normalise=True)
        assert product.out is not None
        return Stream(product.out)
    product = _second_product(call, sublayer, inner, stream, Outputs(out=slot.get("sum")))
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
    """Finish a network call: return its output, and the next call's stream, which is output + ``addend``.

    Args:
        addend: x + y, or y before the update of the answer; None after it.
        keep: Whether to return the output in addition to the next stream.
        reader, reader_slot: First sublayer of the next call, and the slot for its stream.
    """
    outputs = Outputs() if addend is None else call.outputs(reader, reader_slot, "in")
    norm = call.output_norm if call.layout.pre_norm else Norm(None, call.eps)
    if norm is None:
        outputs = replace(outputs, keep=keep)
        product = _second_product(call, sublayer, inner, stream, outputs, addend=addend, mask=mask)
        following = None if product.next is None else Stream(product.next, product.copy, product.sumsq)
        return product.out, following
    product = _second_product(call, sublayer, inner, stream, Outputs(out=slot.get("sum")))
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
        outputs=outputs,
    )
    return normed, following
