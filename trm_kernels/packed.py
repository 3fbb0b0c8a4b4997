"""The ``eager`` backend's recursion over packed rows: padding costs nothing, in plain PyTorch.

The valid positions of all samples are gathered once, run through the recursion as rows [R, D], and put back
once. Only attention sees sequences: the rows are sorted by the length of their sample, so that all samples of
one length are one view, without padding and without a mask.

Shapes: B batch, L sequence, D width, R rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from trm_kernels import reference
from trm_kernels.fused_checks import is_hooked, refuses_modules
from trm_kernels.network import FusedModule
from trm_kernels.packed_attention import PackedAttention
from trm_kernels.packing import Packing, Rows, read_positions


@dataclass(frozen=True)
class SortedRows(Rows):
    """Packed rows without a gap, those of shorter samples first.

    Attributes:
        groups: (S, l): S samples of length l follow, l ascending.
    """

    groups: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, mask: Tensor, lengths: Sequence[int]) -> SortedRows:
        """Pack the positions where ``mask`` [B, L] is not 0; ``lengths``: how many each sample has."""
        mask = mask != 0
        batch, length = mask.shape
        groups = tuple((samples, size) for size, samples in sorted(Counter(lengths).items()) if size > 0)
        rows = sum(lengths)
        # One stable sort finds the rows of every device without waiting for it: padding goes behind them.
        keys = torch.where(mask, mask.sum(dim=1, keepdim=True), length + 1)
        order = torch.argsort(keys.flatten(), stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(batch * length, device=mask.device))
        return cls(batch, length, order[:rows], place.clamp_(max=rows - 1), mask, groups)


def refuses(net: FusedModule, states: Sequence[Tensor], mask: Tensor | Packing) -> str | None:
    """Why a recursion must run on the padded batch, or None."""
    if torch.compiler.is_compiling():
        return "torch.compile would compile again for other lengths"
    if torch._C._len_torch_dispatch_stack() > 0:
        return "the tensors under a dispatch mode may hold no data"
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return "there are no rules for torch.func transforms or forward-mode differentiation"
    y = states[1]
    valid = mask.mask if isinstance(mask, Packing) else mask
    if any(tensor.device != y.device for tensor in (*states, valid)):
        return "mask and states are on different devices"
    if y.is_cuda and torch.cuda.is_current_stream_capturing():
        return "a captured graph would keep these lengths"
    lengths = _lengths(mask)
    if lengths is None:
        return f"the lengths are on {valid.device}, which nothing waits for: give a Packing with lengths"
    if sum(lengths) in (0, valid.numel()):
        return "there is no padding" if valid.numel() == sum(lengths) else "there is nothing but padding"
    if is_hooked(net):
        return "the network has hooks or a forward of its own"
    return refuses_modules(net, y)


def _lengths(mask: Tensor | Packing) -> Sequence[int] | None:
    """Number of valid positions of each sample, where it can be known without waiting for a device."""
    if isinstance(mask, Packing):
        if mask.lengths is not None:
            return mask.lengths
        mask = mask.mask
    if mask.device.type != "cpu":
        return None
    lengths: list[int] = (mask != 0).sum(dim=1).tolist()
    return lengths


def run_recursion(
    net: FusedModule,
    x: Tensor,
    y: Tensor,
    z: Tensor,
    n: int,
    *,
    T: int,
    mask: Tensor | Packing,
    output_norm: Callable[[Tensor], Tensor] | None,
    with_gradients: bool,
    memory: str,
    precision: None,
    read: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """T - 1 latent recursions without gradient and one with, on states [B, L, D] of one dtype."""
    lengths = _lengths(mask)
    assert lengths is not None
    rows = SortedRows.of(mask.mask if isinstance(mask, Packing) else mask, lengths)
    given_z = z
    x, y, z = (rows.pack(state)[0] for state in (x, y, z))  # each [R, D]
    network = _PackedNetwork(net, rows, y)

    def call(h: Tensor) -> Tensor:
        out = network(h)
        return out if output_norm is None else output_norm(out)

    def recursion(y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        recompute = memory == "small" and torch.is_grad_enabled()

        def step(h: Tensor) -> Tensor:
            return checkpoint(call, h, use_reentrant=False) if recompute else call(h)

        question = x + y  # constant over the n steps
        for _ in range(n):
            z = step(question + z)
        return step(y + z), z

    with torch.no_grad():
        for _ in range(T - 1):
            y, z = recursion(y, z)
    with torch.set_grad_enabled(with_gradients and torch.is_grad_enabled()):
        y, z = recursion(y, z)
        y = rows.unpack(y)
        return (
            y if read is None else read_positions(y, read),
            given_z if n == 0 else rows.unpack(z),
        )


class _PackedNetwork:
    """A network applied to packed rows [R, D]."""

    def __init__(self, net: FusedModule, rows: SortedRows, like: Tensor) -> None:
        config = net.config
        rotary = None
        if config.rotary:
            cos, sin = reference.rotary_tables(rows.length, config.head_dim, config.rope_theta, like)
            positions = rows.positions()
            rotary = cos[positions], sin[positions]
        self.net = net
        self.attend = PackedAttention(rows.groups, config.n_heads, rotary)

    def __call__(self, h: Tensor) -> Tensor:
        for block in self.net.blocks:
            assert isinstance(block, reference.TransformerBlock)
            h = self._block(block, h)
        return h

    def _block(self, block: reference.TransformerBlock, h: Tensor) -> Tensor:
        config = block.config
        attention = block.mixer if config.family == "scratch" else block.self_attn
        assert isinstance(attention, reference.SelfAttention)
        dropout = config.dropout if attention.training else 0.0

        def mix(h: Tensor) -> Tensor:
            return attention.output(self.attend(attention.project(h), dropout))

        if config.pre_norm:
            h = h + mix(block.norm1(h))
            return h + (block.ffn if config.family == "scratch" else block.mlp)(block.norm2(h))
        h = reference.rms_norm(h + mix(h), config.norm_eps)
        return reference.rms_norm(h + block.mlp(h), config.norm_eps)
