"""Emulates the kernels' fp8 recursion in plain PyTorch, with identical rounding of operands.

    v     = h * column, or h             rows of activations [B L, K], or of a matrix [N, K]
    scale = max |v| / 448
    q     = e4m3(v / scale)              to nearest, ties to even, as in hardware
    A W^T = (q_a q_w^T) * scale_a * scale_w, in float32

As in the kernels, the norm before a matrix is folded: its weight into the matrix before quantisation, and its
1 / rms into the scale of the row. Attention, the residual stream, biases and activations have the kernels'
precision. Products are summed in float32. NVIDIA's Hopper is reported to keep only about 14 bits of a sum of
fp8 products (arXiv 2412.19437, section 3.5.2), which is not emulated.

Source: :mod:`trm_kernels.ops.quantise`, :mod:`trm_kernels.ops.sublayer`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trm_kernels import reference
from trm_kernels.backends.checks import block_parameters, operand_dtype

LARGEST = 448.0
#: All values of e4m3 by bit pattern. A look-up is four times as fast as PyTorch's conversion back.
_VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


class Rows(NamedTuple):
    """Rows in fp8."""

    values: Tensor  # e4m3 values as float32 [..., K]
    scale: Tensor  # float32 [..., 1]


def round_to_fp8(values: Tensor) -> Tensor:
    """The nearest values of e4m3, as float32."""
    bits = values.to(torch.float8_e4m3fn).view(torch.uint8).int()
    return _VALUES.to(values.device).index_select(0, bits.flatten()).view(values.shape)


def quantise_rows(x: Tensor, *, column: Tensor | None = None, eps: float | None = None) -> Rows:
    """Quantise rows [..., K] like :func:`trm_kernels.ops.quantise.quantise_rows`.

    Args:
        x: The rows.
        column: Factors of the columns, [K].
        eps: Epsilon of the RMSNorm to apply to the rows; None for no norm.
    """
    v = x.float()
    if column is not None:
        v = v * column.float()
    largest = v.abs().amax(dim=-1, keepdim=True)
    scale = torch.where(largest > 0.0, largest / LARGEST, torch.ones_like(largest))
    q = round_to_fp8((v / scale).clamp(-LARGEST, LARGEST))
    if eps is not None:
        scale = scale * torch.rsqrt(v.square().mean(dim=-1, keepdim=True) + eps)
    return Rows(q, scale)


def product(a: Rows, weight: Rows) -> Tensor:
    """``A W^T`` of rows [..., K] and [N, K], float32 [..., N]."""
    return F.linear(a.values, weight.values) * (a.scale * weight.scale.squeeze(-1))


class _Half(NamedTuple):
    """One sublayer's matrices in fp8."""

    first: Rows
    first_bias: Tensor | None
    second: Rows
    second_bias: Tensor | None


#: The operation between the two products of a sublayer, on the result of the first, its bias and a dtype.
_Between = Callable[[Tensor, "Tensor | None", torch.dtype], Tensor]


class EmulatedNetwork(nn.Module):
    """A reference network without gradient, its matrix products in fp8.

    The matrices are quantised when it is built: build another after the weights have changed. Under autocast,
    operands of attention and what the first matrix of a sublayer gives are rounded to autocast's dtype, as in
    the kernels.

    Args:
        net: Any family with attention; its parameters are float32.

    Raises:
        ValueError: ``net`` mixes tokens with an MLP, whose products the kernels do not run in fp8.
    """

    def __init__(self, net: reference.TinyRecursiveNetwork) -> None:
        super().__init__()
        if net.config.mixer == "tokens":
            raise ValueError("the kernels run no token mixer in fp8: use mixer='attention'")
        self.config = net.config
        with torch.no_grad():
            self._blocks = [self._halves(block_parameters(block)) for block in net.layers]

    def _halves(self, parameters: list[Tensor]) -> tuple[_Half, _Half]:
        family, remaining = self.config.family, iter(parameters)

        def half(matrices: int) -> _Half:
            norm = next(remaining) if self.config.pre_norm else None
            first = torch.cat([next(remaining) for _ in range(matrices)])
            first_bias = next(remaining) if family == "seed" else None
            second = next(remaining)
            second_bias = next(remaining) if family == "seed" else None
            return _Half(quantise_rows(first, column=norm), first_bias, quantise_rows(second), second_bias)

        return half(3 if family == "scratch" else 1), half(2 if family == "scratch" else 1)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Apply every block to ``x`` [B, L, D]."""
        operand = operand_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            for mixer, mlp in self._blocks:
                x = self._sublayer(x, mixer, self._attention, operand)
                x = self._sublayer(x, mlp, self._activation, operand)
        return x

    def _sublayer(self, h: Tensor, half: _Half, between: _Between, operand: torch.dtype) -> Tensor:
        eps = self.config.norm_eps
        first = product(quantise_rows(h, eps=eps if self.config.pre_norm else None), half.first)
        inner = between(first, half.first_bias, operand)
        out = product(quantise_rows(inner), half.second)
        out = (h + (out if half.second_bias is None else out + half.second_bias)).to(h.dtype)
        return out if self.config.pre_norm else reference.rms_norm(out, eps)

    def _attention(self, qkv: Tensor, bias: Tensor | None, operand: torch.dtype) -> Tensor:
        config = self.config
        batch, length, _ = qkv.shape
        # As the kernels: projections are stored without their bias, that of the keys cancels in the softmax,
        # and that of the values goes through it unchanged.
        heads = (batch, length, 3, config.n_heads, config.head_dim)
        q, k, v = qkv.to(operand).view(heads).permute(2, 0, 3, 1, 4)  # each [B, H, L, E]
        of_values = 0.0
        if bias is not None:
            of_queries, _, of_values = bias.view(3, config.n_heads, 1, config.head_dim)
            q = (q + of_queries).to(operand)
        if config.rotary:
            tables = reference.rotary_tables(length, config.head_dim, config.rope_theta, qkv)
            q, k = reference.apply_rotary(q, tables), reference.apply_rotary(k, tables)
        out = (reference.attention(q, k, v, None) + of_values).to(operand)
        return out.transpose(1, 2).reshape(batch, length, config.d_model)

    def _activation(self, first: Tensor, bias: Tensor | None, operand: torch.dtype) -> Tensor:
        if bias is not None:
            return F.gelu(first + bias).to(operand)
        gate, up = first.chunk(2, dim=-1)
        return (F.silu(gate) * up).to(operand)
