"""Tiny recursive networks in plain PyTorch: the ground truth of every test, and the ``eager`` backend.

Three block families and one recursion (arXiv 2510.04871, figure 3). This file is deliberately not optimised:
a kernel is correct if it agrees with it.

Shapes: B batch, L sequence, D width, H heads, E head size (D / H).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trm_kernels.config import NetworkConfig

RotaryTables = tuple[Tensor, Tensor]


def rms_norm(x: Tensor, eps: float, dim: int = -1) -> Tensor:
    """Return ``x / sqrt(mean(x^2) + eps)`` along ``dim``, computed in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(dim, keepdim=True) + eps)).to(x.dtype)


def rotary_tables(length: int, head_dim: int, theta: float, like: Tensor) -> RotaryTables:
    """Return the cosines and sines of RoPE, each [L, E/2] in float32 or wider (arXiv 2104.09864)."""
    wide = torch.promote_types(like.dtype, torch.float32)
    channel = torch.arange(0, head_dim, 2, dtype=wide, device=like.device)
    position = torch.arange(length, dtype=wide, device=like.device)
    angle = torch.outer(position, 1.0 / theta ** (channel / head_dim))  # [L, E/2]
    return angle.cos(), angle.sin()


def apply_rotary(x: Tensor, tables: RotaryTables) -> Tensor:
    """Rotate ``x`` [B, H, L, E] by position, NeoX layout: channel i pairs with channel i + E/2."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (table.to(wide) for table in tables)
    first, second = x.to(wide).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: float = 0.0,
    keep: Tensor | None = None,
) -> Tensor:
    """Softmax attention on [B, H, L, E] with a key mask [B, L] (True = valid).

    ``keep`` [B, H, L, L] replaces the random dropout mask, so that two implementations can be compared.
    A row without valid keys attends to all keys; the block zeroes it afterwards.
    """
    allowed = None
    if mask is not None:
        allowed = (mask | ~mask.any(dim=-1, keepdim=True))[:, None, None, :]
    if keep is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    return (scores.softmax(dim=-1) * keep / (1.0 - dropout)).to(v.dtype) @ v


class RMSNorm(nn.Module):
    """RMSNorm with a weight [D]."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class CastedLinear(nn.Linear):
    """A linear layer without bias that casts its weight to the input's dtype, as in the official model."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=self.in_features**-0.5, a=-2.0, b=2.0)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class SelfAttention(nn.Module):
    """Multi-head self-attention. Subclasses define the names and shapes of their family's projections."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config

    def project(self, x: Tensor) -> Tensor:
        """Compute queries, keys and values, [B, L, 3 D]."""
        raise NotImplementedError

    def output(self, x: Tensor) -> Tensor:
        """Apply the output projection, [B, L, D] to [B, L, D]."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        rotary: RotaryTables | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        batch, length, _ = x.shape
        heads = (batch, length, 3, self.config.n_heads, self.config.head_dim)
        q, k, v = self.project(x).view(heads).permute(2, 0, 3, 1, 4)  # each [B, H, L, E]
        if rotary is not None:
            q, k = apply_rotary(q, rotary), apply_rotary(k, rotary)
        # Test dropout first, so that torch.compile guards on train or eval mode only if it matters.
        dropout = self.config.dropout if self.config.dropout > 0.0 and self.training else 0.0
        out = attention(q, k, v, mask, dropout, keep)
        return self.output(out.transpose(1, 2).reshape(batch, length, self.config.d_model))


class SeedAttention(SelfAttention):
    """Attention with the parameter names, shapes and initialisation of ``nn.MultiheadAttention``."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        d = config.d_model
        self.in_proj_weight = nn.Parameter(torch.empty(3 * d, d))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * d))
        self.out_proj = nn.Linear(d, d)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def project(self, x: Tensor) -> Tensor:
        return F.linear(x, self.in_proj_weight, self.in_proj_bias)

    def output(self, x: Tensor) -> Tensor:
        return self.out_proj(x)


class RotaryFrequencies(nn.Module):
    """Stores the ``inv_freq`` [E/2] that a from-scratch model has in its state dict."""

    inv_freq: Tensor

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        channel = torch.arange(0, head_dim, 2).float()
        self.register_buffer("inv_freq", 1.0 / theta ** (channel / head_dim))


class ScratchAttention(SelfAttention):
    """Attention with four separate projections without bias, and RoPE."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        d = config.d_model
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(d, d, bias=False) for _ in range(4))
        if config.rotary:
            self.rope = RotaryFrequencies(config.head_dim, config.rope_theta)

    def project(self, x: Tensor) -> Tensor:
        return torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), dim=-1)

    def output(self, x: Tensor) -> Tensor:
        return self.o_proj(x)


class PaperAttention(SelfAttention):
    """Attention with a packed query, key and value projection without bias."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        self.qkv_proj = CastedLinear(config.d_model, 3 * config.d_model)
        self.o_proj = CastedLinear(config.d_model, config.d_model)

    def project(self, x: Tensor) -> Tensor:
        return self.qkv_proj(x)

    def output(self, x: Tensor) -> Tensor:
        return self.o_proj(x)


class GeluMixer(nn.Module):
    """Linear-GELU(erf)-Linear along the sequence axis, with biases."""

    def __init__(self, length: int, inner: int) -> None:
        super().__init__()
        self.mlp1 = nn.Linear(length, inner)
        self.mlp2 = nn.Linear(inner, length)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp2(F.gelu(self.mlp1(x.transpose(1, 2)))).transpose(1, 2)


class SwiGLU(nn.Module):
    """``w2(silu(w1 x) * w3 x)`` without biases (arXiv 2002.05202)."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, inner, bias=False)
        self.w2 = nn.Linear(inner, dim, bias=False)
        self.w3 = nn.Linear(dim, inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class PackedSwiGLU(nn.Module):
    """SwiGLU whose gate and up projections are the two halves of one weight."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.gate_up_proj = CastedLinear(dim, 2 * inner)
        self.down_proj = CastedLinear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class TransformerBlock(nn.Module):
    """One block of any family, with the parameter names of the family's original model."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        build = {"seed": self._build_seed, "scratch": self._build_scratch, "paper": self._build_paper}
        build[config.family](config)

    def _build_seed(self, config: NetworkConfig) -> None:
        self.norm1 = RMSNorm(config.d_model, config.norm_eps)
        self.self_attn: SelfAttention = SeedAttention(config)
        self.norm2 = RMSNorm(config.d_model, config.norm_eps)
        self.mlp: nn.Module = nn.Sequential(
            nn.Linear(config.d_model, config.d_ff), nn.GELU(), nn.Linear(config.d_ff, config.d_model)
        )

    def _build_scratch(self, config: NetworkConfig) -> None:
        self.norm1 = RMSNorm(config.d_model, config.norm_eps)
        self.norm2 = RMSNorm(config.d_model, config.norm_eps)
        if config.mixer == "tokens":
            assert config.seq_len is not None
            self.mixer: nn.Module = GeluMixer(config.seq_len, config.token_ff)
        else:
            self.mixer = ScratchAttention(config)
        self.ffn = SwiGLU(config.d_model, config.d_ff)

    def _build_paper(self, config: NetworkConfig) -> None:
        if config.mixer == "tokens":
            assert config.seq_len is not None
            self.mlp_t = PackedSwiGLU(config.seq_len, config.token_ff)
        else:
            self.self_attn = PaperAttention(config)
        self.mlp = PackedSwiGLU(config.d_model, config.d_ff)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        rotary: RotaryTables | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Apply the block.

        Args:
            x: Residual stream [B, L, D].
            mask: True at valid positions [B, L]. Other positions are not attended to and their output is
                zero.
            rotary: RoPE tables; computed here if the family uses RoPE and none are passed.
            keep: Dropout mask [B, H, L, L] to use instead of a random one.
        """
        config = self.config
        if config.rotary and rotary is None:
            rotary = rotary_tables(x.shape[1], config.head_dim, config.rope_theta, x)
        if config.family == "paper":
            out = self._post_norm(x, mask, rotary)
        else:
            out = self._pre_norm(x, mask, rotary, keep)
        return out if mask is None else out.masked_fill(~mask[..., None], 0.0)

    def _pre_norm(
        self, x: Tensor, mask: Tensor | None, rotary: RotaryTables | None, keep: Tensor | None
    ) -> Tensor:
        mlp = self.mlp if self.config.family == "seed" else self.ffn
        if self.config.mixer == "tokens":
            x = x + self.mixer(self.norm1(x))
        else:
            mixer = self.self_attn if self.config.family == "seed" else self.mixer
            x = x + mixer(self.norm1(x), mask, rotary, keep)
        return x + mlp(self.norm2(x))

    def _post_norm(self, x: Tensor, mask: Tensor | None, rotary: RotaryTables | None) -> Tensor:
        eps = self.config.norm_eps
        if self.config.mixer == "tokens":
            x = rms_norm(x + self.mlp_t(x.transpose(1, 2)).transpose(1, 2), eps, dim=1)
        else:
            x = rms_norm(x + self.self_attn(x, mask, rotary), eps)
        return rms_norm(x + self.mlp(x), eps)


class TinyRecursiveNetwork(nn.Module):
    """A stack of blocks: the ``net`` of the recursion."""

    block_class: type[TransformerBlock] = TransformerBlock

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(self.block_class(config) for _ in range(config.n_layers))

    def forward(self, x: Tensor, mask: Tensor | None = None, keeps: list[Tensor] | None = None) -> Tensor:
        """Apply every block.

        Args:
            x: Input [B, L, D].
            mask: 1 at valid positions, 0 at padding [B, L], any dtype.
            keeps: One dropout mask [B, H, L, L] per block, to use instead of random ones.
        """
        config = self.config
        if mask is not None:
            mask = mask != 0
        rotary = None
        if config.rotary:
            rotary = rotary_tables(x.shape[1], config.head_dim, config.rope_theta, x)
        for i, layer in enumerate(self.layers):
            x = layer(x, mask, rotary, keeps[i] if keeps else None)
        return x


def latent_recursion(
    net: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, z: Tensor, n: int
) -> tuple[Tensor, Tensor]:
    """Compute ``z = net(x + y + z)`` n times, then ``y = net(y + z)``; returns ``(y, z)``."""
    for _ in range(n):
        z = net(x + y + z)
    return net(y + z), z


def deep_recursion(
    net: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, z: Tensor, n: int, T: int
) -> tuple[Tensor, Tensor]:
    """Run T - 1 latent recursions without gradients, then one with gradients; returns ``(y, z)``."""
    with torch.no_grad():
        for _ in range(T - 1):
            y, z = latent_recursion(net, x, y, z, n)
    return latent_recursion(net, x, y, z, n)
