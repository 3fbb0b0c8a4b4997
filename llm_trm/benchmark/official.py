"""A reimplementation of SamsungSAILMontreal/TinyRecursiveModels' block and recursion (arXiv 2510.04871).

It computes the function of this library's paper family, with the same parameter names. It keeps everything
that determines the original's speed: weights cast to the stream's dtype in every call, RoPE and norms as
separate float32 operations on cached tables, PyTorch's fused attention, and the injection ``z + (y + x)``
added in every call.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_trm.benchmark.models import Build, Model, State, with_state
from llm_trm.benchmark.workloads import Case
from trm_kernels.config import NetworkConfig

Tables = tuple[Tensor, Tensor]


class CastedWeight(nn.Module):
    """A linear map without bias whose weight is cast to the dtype of its input."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, self.weight.to(h.dtype))


def unit_rms(h: Tensor, eps: float) -> Tensor:
    """Divide h [..., D] by its root mean square, in float32 or wider."""
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(h.dtype)


def turn(heads: Tensor, tables: Tables) -> Tensor:
    """Rotate heads [B, L, H, E] by the tables [L, E], whose two halves are equal."""
    cos, sin = (table[:, None] for table in tables)
    wide = heads.to(cos.dtype)
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(heads.dtype)


class OfficialAttention(nn.Module):
    """Packed projections, RoPE and PyTorch's fused attention."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.n_heads, config.head_dim
        self.qkv_proj = CastedWeight(config.d_model, 3 * config.d_model)
        self.o_proj = CastedWeight(config.d_model, config.d_model)

    def forward(self, h: Tensor, tables: Tables) -> Tensor:
        packed = self.qkv_proj(h).unflatten(-1, (3 * self.heads, self.head_dim))
        q, k, v = packed.split(self.heads, dim=2)  # each [B, L, H, E]
        q, k = turn(q, tables), turn(k, tables)
        mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class OfficialSwiGLU(nn.Module):
    """SwiGLU with one packed input projection."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.gate_up_proj = CastedWeight(config.d_model, 2 * config.d_ff)
        self.down_proj = CastedWeight(config.d_ff, config.d_model)

    def forward(self, h: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(h).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class OfficialBlock(nn.Module):
    """Post-norm block of attention and SwiGLU."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.self_attn = OfficialAttention(config)
        self.mlp = OfficialSwiGLU(config)
        self.eps = config.norm_eps

    def forward(self, h: Tensor, tables: Tables) -> Tensor:
        h = unit_rms(h + self.self_attn(h, tables), self.eps)
        return unit_rms(h + self.mlp(h), self.eps)


class OfficialLevel(nn.Module):
    """The reasoning module, which adds the injection and applies its blocks."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(OfficialBlock(config) for _ in range(config.n_layers))

    def forward(self, h: Tensor, injection: Tensor, tables: Tables) -> Tensor:
        h = h + injection
        for layer in self.layers:
            h = layer(h, tables)
        return h


def rope_tables(length: int, head_dim: int, theta: float, like: Tensor) -> Tables:
    """Cosines and sines [L, E]; the angles of E/2 channels are repeated twice."""
    wide = torch.promote_types(like.dtype, torch.float32)
    channel = torch.arange(0, head_dim, 2, device=like.device, dtype=wide) / head_dim
    angle = torch.arange(length, device=like.device, dtype=wide)[:, None] / theta**channel
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def model(compiled: Literal["no", "level", "recursion"] = "no") -> Build:
    """The official recursion over an :class:`OfficialLevel` with the parameters of the paper family.

    Args:
        compiled: What torch.compile compiles: nothing, the reasoning module that all calls share, or one
            latent recursion with its calls unrolled into one graph. The official script compiles the whole
            model, which unrolls all recursions but only fuses more at their boundaries.
    """

    def build(case: Case, state: State) -> Model:
        config = case.config()
        net = with_state(lambda: OfficialLevel(config), state)
        level = torch.compile(net, dynamic=False, fullgraph=True) if compiled == "level" else net
        tables = rope_tables(case.latents, config.head_dim, config.rope_theta, next(net.parameters()))

        def latent(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
            for _ in range(case.steps):
                z = level(z, y + x, tables)
            return level(y, z, tables), z

        if compiled == "recursion":
            latent = torch.compile(latent, dynamic=False, fullgraph=True)

        def deep(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                for _ in range(case.recursions - 1):
                    y, z = latent(x, y, z)
            return latent(x, y, z)

        return Model(net, latent, deep)

    return build
