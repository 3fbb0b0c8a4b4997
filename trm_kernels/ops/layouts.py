"""The families of block as the kernels see them: which parameters each has, in what order."""

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
    """How one sublayer's parameters lie in the flat list: [norm] first... [bias] second [bias]."""

    weights: int = 1
    biases: bool = False
    tokens: bool = False
    activation: Activation = Activation.NONE

    def parameters(self, pre_norm: bool) -> int:
        """Number of tensors in the flat list."""
        return pre_norm + self.weights + 1 + 2 * self.biases


@dataclass(frozen=True)
class Layout:
    """A family of block: two sublayers, the mixer and the MLP."""

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
    """Whether the norms of a block are folded into the weights behind them.

    Not in float16, whose range neither the unnormalised stream (over 65504) nor the folded weights (products
    under 6e-5) need respect; not beside a token mixer, which contracts, and writes, along another axis than
    the norms; and not behind a post-norm, whose row is not yet complete in the epilogue that writes it.
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
    second: Tensor  # [D, N], a token mixer's [L, N]
    second_bias: Tensor | None  # [D]
    first_matrix: Tensor | None = None  # [N, K], operand dtype or fp8
    second_matrix: Tensor | None = None  # like second, operand dtype or fp8
    first_scales: Tensor | None = None  # of the rows of an fp8 first matrix [N], float32
    second_scales: Tensor | None = None  # of those of an fp8 second matrix

    @property
    def inner(self) -> int:
        """Rows N of the first matrix."""
        return sum(weight.shape[0] for weight in self.first)

    def prepare(self, operand: torch.dtype) -> tuple[Tensor, Tensor]:
        """The two matrices in ``operand``: folded, stacked or cast; the parameters themselves where they serve."""
        if self.folded:
            assert self.norm is not None
            first = fold(self.first, self.norm, operand)
        else:
            first = stack(self.first, operand)
            first = aligned(first) if self.layout.tokens else first
        return first, self.second.to(operand)

    def prepare_fp8(self, operand: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The two matrices in fp8 and their scales; a token mixer's in ``operand``, with empty scales.

        A token mixer's operands have their rows along the sequence, where fp8 tiles of them cannot be loaded
        without a transposition.
        """
        if self.layout.tokens:
            first, second = self.prepare(operand)
            return first, second, first.new_empty(0), first.new_empty(0)
        stacked = stack(self.first, self.first[0].dtype).contiguous()
        first, first_scales = quantise_rows(stacked, column=self.norm)
        second, second_scales = quantise_rows(self.second.contiguous())
        return first, second, first_scales, second_scales

    def take(self, matrices: Iterator[Tensor], fp8: bool) -> None:
        """Take what :meth:`prepare` or :meth:`prepare_fp8` made."""
        self.first_matrix, self.second_matrix = next(matrices), next(matrices)
        if fp8:
            scales = next(matrices), next(matrices)
            if not self.layout.tokens:
                self.first_scales, self.second_scales = scales
                self.folded = False  # the kernel that quantises a row normalises it


def unpack_sublayer(
    layout: Layout, part: SublayerLayout, parameters: Iterator[Tensor], operand: torch.dtype
) -> Sublayer:
    """Take one sublayer's tensors off the front of a flat list."""

    def vector() -> Tensor:
        return next(parameters).contiguous()  # matrices are read with their strides, vectors are not

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
    """Blocks from the flat list of their parameters, one block behind the other."""
    remaining = iter(parameters)
    blocks = []
    for _ in range(len(parameters) // layout.parameters):
        mixer = unpack_sublayer(layout, layout.mixer, remaining, operand)
        blocks.append(Block(mixer, unpack_sublayer(layout, layout.mlp, remaining, operand)))
    return blocks


def prepare(
    layout: Layout, parameters: list[Tensor], operand: torch.dtype, *, fp8: bool = False
) -> list[Tensor]:
    """The matrices that the GEMMs of a network read, of every sublayer in order: first and second, in fp8
    followed by their scales.
    """
    parts = [part for block in unpack(layout, parameters, operand) for part in block.sublayers]
    if fp8:
        return [matrix for part in parts for matrix in part.prepare_fp8(operand)]
    return [matrix for part in parts for matrix in part.prepare(operand)]


def with_matrices(
    blocks: list[Block], matrices: list[Tensor], operand: torch.dtype, *, fp8: bool = False
) -> list[Block]:
    """Give blocks the matrices that :func:`prepare` made; where there are none, they are made here."""
    given = iter(matrices)
    for block in blocks:
        for part in block.sublayers:
            if matrices:
                part.take(given, fp8)
            else:
                part.take(iter(part.prepare_fp8(operand) if fp8 else part.prepare(operand)), fp8)
    return blocks
