"""The recursion of ``eager`` and ``compile`` over packed rows, without computing padding, in plain PyTorch.

The valid positions of all samples are gathered once, pass through the recursion as rows [R, D], and are
scattered back once. Only attention sees sequences: the rows are sorted by the length of their sample, so that
all samples of one length form one view, without padding or a mask. The ``compile`` backend compiles the parts
between two attentions, where only the number of rows depends on the lengths.

Shapes: B batch, L sequence, D width, R rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from trm_kernels import reference
from trm_kernels.backends.checks import block_parameters, refuses_modules, refuses_skipping
from trm_kernels.backends.packed_attention import PackedAttention
from trm_kernels.backends.registry import Recursion
from trm_kernels.backends.stepwise import step_by_step
from trm_kernels.config import NetworkConfig
from trm_kernels.module import FusedModule
from trm_kernels.packing import Packing, Rows, read_positions

#: Calls its first argument, a part of a network, with the remaining arguments.
RunRows = Callable[..., Tensor]


def plain_rows(part: Callable[..., Tensor], *args: Any) -> Tensor:
    return part(*args)


@dataclass(frozen=True)
class SortedRows(Rows):
    """Packed rows without unused rows, shorter samples first.

    Attributes:
        groups: Consecutive pairs (S, l): S samples of length l, with l ascending.
    """

    groups: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, mask: Tensor, lengths: Sequence[int]) -> SortedRows:
        """Pack the positions where ``mask`` [B, L] is not 0. ``lengths`` has their number in each sample."""
        mask = mask != 0
        batch, length = mask.shape
        groups = tuple((samples, size) for size, samples in sorted(Counter(lengths).items()) if size > 0)
        rows = sum(lengths)
        # One stable sort finds the rows without synchronising with the device, and moves padding to the end.
        keys = torch.where(mask, mask.sum(dim=1, keepdim=True), length + 1)
        order = torch.argsort(keys.flatten(), stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(batch * length, device=mask.device))
        return cls(batch, length, order[:rows], place.clamp_(max=rows - 1), mask, groups)


def refuses(net: FusedModule, states: Sequence[Tensor], request: Recursion) -> str | None:
    """Return why a recursion must run on the padded batch, or None."""
    mask, valid = request.mask, request.valid
    if mask is None or valid is None:
        return "there is no padding"
    if torch.compiler.is_compiling():
        return "torch.compile would recompile for other lengths"
    if torch._C._len_torch_dispatch_stack() > 0:
        return "tensors under a dispatch mode may hold no data"
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return "packing does not support torch.func transforms or forward-mode differentiation"
    y = states[1]
    if any(tensor.device != y.device for tensor in (*states, valid)):
        return "mask and states are on different devices"
    if y.dtype != torch.float32 and torch.is_autocast_enabled(y.device.type):
        return f"under autocast the padded recursion widens a {y.dtype} stream"
    if y.is_cuda and torch.cuda.is_current_stream_capturing():
        return "a captured graph would fix these lengths"
    lengths = _lengths(mask)
    if lengths is None:
        return f"reading the lengths would synchronise with {valid.device}: pass a Packing with lengths"
    if sum(lengths) in (0, valid.numel()):
        return "there is no padding" if valid.numel() == sum(lengths) else "there is only padding"
    return refuses_skipping(net) or refuses_modules(net, y)


def _lengths(mask: Tensor | Packing) -> Sequence[int] | None:
    """Return the number of valid positions of each sample, or None if that requires synchronisation."""
    if isinstance(mask, Packing):
        if mask.lengths is not None:
            return mask.lengths
        mask = mask.mask
    if mask.device.type != "cpu":
        return None
    lengths: list[int] = (mask != 0).sum(dim=1).tolist()
    return lengths


def run_recursion(
    net: FusedModule, states: Sequence[Tensor], request: Recursion, *, run_part: RunRows = plain_rows
) -> tuple[Tensor, Tensor]:
    """Run T - 1 latent recursions without gradients and one with, on states [B, L, D] of one dtype.

    ``run_part`` runs the parts between two attentions.
    """
    n, T, mask, output_norm, with_gradients, memory, _, read = request
    valid = request.valid
    assert mask is not None and valid is not None
    lengths = _lengths(mask)
    assert lengths is not None
    rows = SortedRows.of(valid, lengths)
    given_z = states[2]
    x, y, z = (rows.pack(state)[0] for state in states)  # each [R, D]
    network = _PackedNetwork(net, rows, y, run_part)

    def call(h: Tensor) -> Tensor:
        out = network(h)
        return out if output_norm is None else output_norm(out)

    with torch.no_grad():
        if T > 1:
            network.read()
        for _ in range(T - 1):
            y, z = step_by_step(call, x, y, z, n, memory)
    with torch.set_grad_enabled(with_gradients and torch.is_grad_enabled()):
        network.read()
        y, z = step_by_step(call, x, y, z, n, memory)
        y = rows.unpack(y)
        return (
            y if read is None else read_positions(y, read),
            given_z if n == 0 else rows.unpack(z),
        )


class _PackedNetwork:
    """A network applied to packed rows [R, D].

    :meth:`read` reads the matrices once for many calls: once for the recursions without gradients, and once
    for the recursion with gradients.
    """

    def __init__(self, net: FusedModule, rows: SortedRows, like: Tensor, run: RunRows) -> None:
        config = net.config
        rotary = None
        if config.rotary:
            cos, sin = reference.rotary_tables(rows.length, config.head_dim, config.rope_theta, like)
            positions = rows.positions()
            rotary = cos[positions], sin[positions]
        self.config = config
        self.attend = PackedAttention(rows.groups, config.n_heads, rotary)
        self.net, self.dtype, self.run = net, like.dtype, run
        self.blocks: list[_Block] = []

    def read(self) -> None:
        """Read the weights, with gradients if they are enabled."""
        self.blocks = [_Block.of(block, self.dtype) for block in self.net.blocks]

    def __call__(self, h: Tensor) -> Tensor:
        for block in self.blocks:
            qkv = self.run(_before_attention, self.config, h, block.qkv)
            attended = self.attend(qkv, block.dropout)
            h = self.run(_after_attention, self.config, h, attended, block.out, block.up, block.down)
        return h


_Linear = tuple[Tensor, Tensor | None]


def _before_attention(config: NetworkConfig, h: Tensor, qkv: _Linear) -> Tensor:
    """Compute queries, keys and values [R, 3 D] from a block's input [R, D]."""
    return F.linear(_normalise(h, config.norm_eps) if config.pre_norm else h, *qkv)


def _after_attention(
    config: NetworkConfig, h: Tensor, attended: Tensor, out: _Linear, up: _Linear, down: _Linear
) -> Tensor:
    """Compute a block's output [R, D] from its input and the attention output [R, D]."""
    h = _add_product(h, attended, *out)
    normalised = _normalise(h, config.norm_eps)
    if not config.pre_norm:
        h = normalised
    inner = F.linear(normalised, *up)
    if config.gated:
        gate, value = inner.chunk(2, dim=-1)
        inner = F.silu(gate) * value
    else:
        inner = F.gelu(inner)
    h = _add_product(h, inner, *down)
    return h if config.pre_norm else _normalise(h, config.norm_eps)


class _Block(NamedTuple):
    """The weights [out, in] and biases [out] of a block.

    The weight of a norm is folded into the matrix after it, once for many calls, so the norm only scales
    rows.
    """

    qkv: _Linear
    out: _Linear
    up: _Linear
    down: _Linear
    dropout: float

    @classmethod
    def of(cls, block: nn.Module, dtype: torch.dtype) -> _Block:
        assert isinstance(block, reference.TransformerBlock)
        family, parameters = block.config.family, block_parameters(block)
        attention = block.mixer if family == "scratch" else block.self_attn
        dropout = block.config.dropout if attention.training else 0.0
        if family == "seed":
            norm1, qkv, qkv_bias, out, out_bias, norm2, up, up_bias, down, down_bias = parameters
            first, second = (_fold(qkv, norm1), qkv_bias), (_fold(up, norm2), up_bias)
            return cls(first, (out, out_bias), second, (down, down_bias), dropout)
        if family == "scratch":
            norm1, q, k, v, out, norm2, gate, up, down = parameters
            first_, second_ = _fold(torch.cat((q, k, v)), norm1), _fold(torch.cat((gate, up)), norm2)
            return cls((first_, None), (out, None), (second_, None), (down, None), dropout)
        qkv, out, up, down = (weight.to(dtype) for weight in parameters)
        return cls((qkv, None), (out, None), (up, None), (down, None), dropout)


def _fold(weight: Tensor, norm: Tensor) -> Tensor:
    """Fold the weight [in] of a norm into ``weight`` [out, in] of the product after it, rounding once."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) * norm.to(wide)).to(weight.dtype)


def _add_product(h: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute ``h + x @ weight.T + bias``; except under autocast, the product itself accumulates ``h``."""
    if x.dtype != h.dtype:
        return h + F.linear(x, weight, bias)
    if bias is None:
        return torch.addmm(h, x, weight.t())
    return (h + bias).addmm_(x, weight.t())


def _normalise(x: Tensor, eps: float) -> Tensor:
    """Apply RMSNorm without a weight to rows [R, D]."""
    if x.dtype in (torch.float32, torch.float64) and not torch.compiler.is_compiling():
        return _Normalise.apply(x, eps)
    return reference.rms_norm(x, eps)


class _Normalise(torch.autograd.Function):
    """RMSNorm with an explicit backward; torch composes both from elementwise operations.

    With folded weights, the forward and backward of a seed recursion take 5 to 8% less time (d 32 to 512, two
    cores).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        out = x * scale
        ctx.save_for_backward(out, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        out, scale = ctx.saved_tensors
        mean = (grad * out).mean(dim=-1, keepdim=True)
        return torch.addcmul(grad, out, mean, value=-1).mul_(scale), None
