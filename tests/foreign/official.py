"""The inner model of SamsungSAILMontreal/TinyRecursiveModels: post-norm blocks, a loop in ``forward``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CosSin = tuple[Tensor, Tensor]


@dataclass
class Config:
    """The fields of the official configuration that matter here, with their names."""

    vocab_size: int = 11
    hidden_size: int = 32
    num_heads: int = 4
    seq_len: int = 9
    puzzle_emb_len: int = 2
    L_layers: int = 2
    H_cycles: int = 2
    L_cycles: int = 2
    expansion: float = 4.0
    pos_encodings: str = "rope"
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    mlp_t: bool = False
    num_key_value_heads: int = 4
    causal: bool = False

    @property
    def positions(self) -> int:
        return self.seq_len + self.puzzle_emb_len


def rms_norm(x: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.pow(2).mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)


class CastedLinear(nn.Module):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) * in_features**-0.5)
        self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class RotaryEmbedding(nn.Module):
    """Returns tables [L, E] for all positions of the model."""

    cos_cached: Tensor
    sin_cached: Tensor

    def __init__(self, dim: int, positions: int, theta: float) -> None:
        super().__init__()
        frequency = theta ** (-torch.arange(0, dim, 2).float() / dim)
        angle = torch.outer(torch.arange(positions).float(), frequency).repeat(1, 2)
        self.register_buffer("cos_cached", angle.cos(), persistent=False)
        self.register_buffer("sin_cached", angle.sin(), persistent=False)

    def forward(self) -> CosSin:
        return self.cos_cached, self.sin_cached


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [B, L, H, E] by tables [L, E]."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cos[:, None] + turned * sin[:, None]).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads = config.num_heads, config.num_key_value_heads
        self.head_dim = config.hidden_size // config.num_heads
        self.causal = config.causal
        packed = (self.num_heads + 2 * self.num_key_value_heads) * self.head_dim
        self.qkv_proj = CastedLinear(config.hidden_size, packed)
        self.o_proj = CastedLinear(config.hidden_size, config.hidden_size)

    def forward(self, cos_sin: CosSin | None, hidden_states: Tensor) -> Tensor:
        groups = self.num_key_value_heads
        heads = self.qkv_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split((self.num_heads, groups, groups), dim=2)
        if cos_sin is not None:
            q, k = rotate(q, *cos_sin), rotate(k, *cos_sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=self.causal, enable_gqa=groups != self.num_heads
        )
        return self.o_proj(out.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, size: int, expansion: float) -> None:
        super().__init__()
        inner = -(-round(expansion * size * 2 / 3) // 256) * 256
        self.gate_up_proj = CastedLinear(size, 2 * inner)
        self.down_proj = CastedLinear(inner, size)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        if config.mlp_t:
            self.mlp_t = SwiGLU(config.positions, config.expansion)
        else:
            self.self_attn = Attention(config)
        self.mlp = SwiGLU(config.hidden_size, config.expansion)
        self.norm_eps = config.rms_norm_eps

    def forward(self, cos_sin: CosSin | None, hidden_states: Tensor) -> Tensor:
        h = hidden_states
        if hasattr(self, "mlp_t"):
            across = h.transpose(1, 2)
            h = rms_norm(across + self.mlp_t(across), self.norm_eps).transpose(1, 2)
        else:
            h = rms_norm(h + self.self_attn(cos_sin, h), self.norm_eps)
        return rms_norm(h + self.mlp(h), self.norm_eps)


class ReasoningModule(nn.Module):
    def __init__(self, layers: list[Block]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, hidden_states: Tensor, input_injection: Tensor, **kwargs: Any) -> Tensor:
        h = hidden_states + input_injection
        for layer in self.layers:
            h = layer(hidden_states=h, **kwargs)
        return h


class Inner(nn.Module):
    """Maps tokens [B, L] to logits [B, L, V]; the puzzle embedding is one learned row per position."""

    H_init: Tensor
    L_init: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        d = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, d)
        self.puzzle_emb = nn.Parameter(torch.zeros(config.puzzle_emb_len, d))
        self.lm_head = CastedLinear(d, config.vocab_size)
        if config.pos_encodings == "rope":
            self.rotary_emb = RotaryEmbedding(d // config.num_heads, config.positions, config.rope_theta)
        else:
            self.embed_pos = nn.Parameter(torch.randn(config.positions, d))
        self.L_level = ReasoningModule([Block(config) for _ in range(config.L_layers)])
        self.register_buffer("H_init", torch.randn(d))
        self.register_buffer("L_init", torch.randn(d))

    def forward(self, tokens: Tensor) -> Tensor:
        config = self.config
        cos_sin = self.rotary_emb() if hasattr(self, "rotary_emb") else None
        puzzle = self.puzzle_emb.expand(len(tokens), -1, -1)
        x = torch.cat((puzzle, self.embed_tokens(tokens)), dim=1)
        if config.pos_encodings == "learned":
            x = 0.5**0.5 * (x + self.embed_pos)
        z_H, z_L = self.H_init.expand_as(x), self.L_init.expand_as(x)
        for cycle in range(config.H_cycles):
            with torch.set_grad_enabled(torch.is_grad_enabled() and cycle == config.H_cycles - 1):
                for _ in range(config.L_cycles):
                    z_L = self.L_level(z_L, z_H + x, cos_sin=cos_sin)
                z_H = self.L_level(z_H, z_L, cos_sin=cos_sin)
        return self.lm_head(z_H)[:, config.puzzle_emb_len :]
