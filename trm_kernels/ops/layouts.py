"""Block families as the kernels see them: the parameters of each, and their order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trm_kernels.ops.fold import aligned, fold, stack
from trm_kernels.ops.quantise import quantise_rows
from trm_kernels.ops.tiles import Activation


@dataclass(frozen=True)
class SublayerLayout:
    """Order of one sublayer's parameters in the flat list: [norm] first... [bias] second [bias]."""

    weights: int = 1
    biases: bool = False
    tokens: bool = False
    activation: Activation = Activation.NONE

    def parameters(self, pre_norm: bool) -> int:
        """Number of tensors in the flat list."""
        return pre_norm + self.weights + 1 + 2 * self.biases


@dataclass(frozen=True)
class Layout:
    """A block family: two sublayers, the mixer and the MLP."""

    pre_norm: bool
    mixer: SublayerLayout
    mlp: SublayerLayout

    @property
    def parameters(self) -> int:
        """Number of tensors in a block's flat list."""
        return self.mixer.parameters(self.pre_norm) + self.mlp.parameters(self.pre_norm)


_GELU_MLP = SublayerLayout(biases=True, activation=Activation.GELU)
LAYOUTS = {
    "seed": Layout(True, SublayerLayout(biases=True), _GELU_MLP),
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


def folds(layout: Layout, operand: torch.dtype) -> bool:
    """Whether the norms of a block are folded into the weights that follow them.

    Not in float16, because the unnormalised stream (over 65504) and the folded weights (products under 6e-5)
    may exceed its range. Not with a token mixer, which contracts and writes along a different axis than the
    norms. Not with post-norm, where the epilogue that writes a row does not have the complete row.
    """
    return layout.pre_norm and not layout.mixer.tokens and operand != torch.float16


@dataclass
class Sublayer:
    """One sublayer's parameters, and the matrices that its GEMMs read."""

    layout: SublayerLayout
    folded: bool
    norm: Tensor | None  # [D]
    first: tuple[Tensor, ...]  # [N_i, K]
    first_bias: Tensor | None  # [N]
    second: Tensor  # [D, N]; token mixers [L, N]
    second_bias: Tensor | None  # [D]
    first_matrix: Tensor | None = None  # [N, K], operand dtype or fp8
    second_matrix: Tensor | None = None  # like second, operand dtype or fp8
    first_scales: Tensor | None = None  # row scales of an fp8 first matrix [N], float32
    second_scales: Tensor | None = None  # row scales of an fp8 second matrix

    @property
    def inner(self) -> int:
        """Number of rows N of the first matrix."""
        return sum(weight.shape[0] for weight in self.first)

    def prepare(self, operand: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the two matrices in ``operand``: folded, stacked or cast, or the parameters themselves."""
        if self.folded:
            assert self.norm is not None
            first = fold(self.first, self.norm, operand)
        else:
            first = stack(self.first, operand)
            first = aligned(first) if self.layout.tokens else first
        return first, self.second.to(operand)

    def prepare_fp8(self, operand: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the two matrices in fp8 and their scales; a token mixer's in ``operand``, with empty scales.

        The rows of a token mixer's operands run along the sequence, so fp8 tiles of them cannot be loaded
        without a transposition.
        """
        if self.layout.tokens:
            first, second = self.prepare(operand)
            return first, second, first.new_empty(0), first.new_empty(0)
        stacked = stack(self.first, self.first[0].dtype).contiguous()
        first, first_scales = quantise_rows(stacked, column=self.norm)
        second, second_scales = quantise_rows(self.second.contiguous())
        return first, second, first_scales, second_scales

    def set_matrices(self, matrices: Iterator[Tensor], fp8: bool) -> None:
        """Set the matrices that :meth:`prepare` or :meth:`prepare_fp8` returned."""
        self.first_matrix, self.second_matrix = next(matrices), next(matrices)
        if fp8:
            scales = next(matrices), next(matrices)
            if not self.layout.tokens:
                self.first_scales, self.second_scales = scales
                self.folded = False  # the quantising kernel normalises the rows


def unpack_sublayer(
    layout: Layout, part: SublayerLayout, parameters: Iterator[Tensor], operand: torch.dtype
) -> Sublayer:
    """Remove one sublayer's tensors from the front of a flat list."""

    def vector() -> Tensor:
        return next(parameters).contiguous()  # kernels support strides for matrices but not for vectors

    return Sublayer(
        part,
        folds(layout, operand),
        vector() if layout.pre_norm else None,
        tuple(next(parameters) for _ in range(part.weights)),
        vector() if part.biases else None,
        next(parameters),
        vector() if part.biases else None,
    )


@dataclass
class Block:
    """The two sublayers of a block."""

    mixer: Sublayer
    mlp: Sublayer

    @property
    def sublayers(self) -> tuple[Sublayer, Sublayer]:
        return self.mixer, self.mlp


def unpack(layout: Layout, parameters: list[Tensor], operand: torch.dtype) -> list[Block]:
    """Build blocks from the concatenated flat lists of their parameters."""
    remaining = iter(parameters)
    blocks = []
    for _ in range(len(parameters) // layout.parameters):
        mixer = unpack_sublayer(layout, layout.mixer, remaining, operand)
        blocks.append(Block(mixer, unpack_sublayer(layout, layout.mlp, remaining, operand)))
    return blocks


def prepare(
    layout: Layout, parameters: list[Tensor], operand: torch.dtype, *, fp8: bool = False
) -> list[Tensor]:
    """Return the matrices that a network's GEMMs read: per sublayer first and second, then fp8 scales."""
    parts = [part for block in unpack(layout, parameters, operand) for part in block.sublayers]
    if fp8:
        return [matrix for part in parts for matrix in part.prepare_fp8(operand)]
    return [matrix for part in parts for matrix in part.prepare(operand)]


def with_matrices(
    blocks: list[Block], matrices: list[Tensor], operand: torch.dtype, *, fp8: bool = False
) -> list[Block]:
    """Set the matrices that :func:`prepare` returned; if there are none, prepare them here."""
    given = iter(matrices)
    for block in blocks:
        for part in block.sublayers:
            if matrices:
                part.set_matrices(given, fp8)
            else:
                part.set_matrices(iter(part.prepare_fp8(operand) if fp8 else part.prepare(operand)), fp8)
    return blocks
