"""A reimplementation of SamsungSAILMontreal/TinyRecursiveModels' puzzle model from its published behaviour.

Names are the official ones, so that ``state_dict`` has the official keys. If ``forward_dtype`` is float64,
nothing is rounded to float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Config:
    vocab_size: int = 11
    seq_len: int = 9
    num_puzzle_identifiers: int = 3
    hidden_size: int = 32
    num_heads: int = 4
    L_layers: int = 2
    H_cycles: int = 3
    L_cycles: int = 2
    expansion: float = 4.0
    pos_encodings: str = "rope"
    rope_theta: float = 10000.0
    mlp_t: bool = False
    puzzle_emb_len: int = 3
    puzzle_emb_ndim: int = 80  # less than 3 x 32: padded with zeros
    forward_dtype: str = "bfloat16"

    @property
    def positions(self) -> int:
        return self.seq_len + self.puzzle_emb_len

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.forward_dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def normalised(x: Tensor) -> Tensor:
    full = x.to(wide(x.dtype))
    return (full / (full.square().mean(-1, keepdim=True) + 1e-5).sqrt()).to(x.dtype)


def casted_linear(rows_in: int, rows_out: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(rows_in, rows_out, bias=bias)


def apply(linear: nn.Linear, x: Tensor) -> Tensor:
    bias = None if linear.bias is None else linear.bias.to(x.dtype)
    return F.linear(x, linear.weight.to(x.dtype), bias)


class CastedEmbedding(nn.Module):
    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding_weight = nn.Parameter(torch.randn(rows, width) * width**-0.5)


class CastedSparseEmbedding(nn.Module):
    weights: Tensor

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.register_buffer(
            "weights", torch.randn(rows, width) * 0.3
        )  # initially zeros in the official code
        self.register_buffer("local_weights", torch.zeros(2, width), persistent=False)
        self.register_buffer("local_ids", torch.zeros(2, dtype=torch.int32), persistent=False)


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.qkv_proj = casted_linear(config.hidden_size, 3 * config.hidden_size)
        self.o_proj = casted_linear(config.hidden_size, config.hidden_size)

    def forward(self, angles: Tensor | None, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        packed = apply(self.qkv_proj, x).view(batch, length, 3 * self.heads, width // self.heads)
        parts = [packed[:, :, i * self.heads : (i + 1) * self.heads] for i in range(3)]
        if angles is not None:
            parts[:2] = [turned(part, angles) for part in parts[:2]]
        q, k, v = (part.transpose(1, 2) for part in parts)
        scores = q @ k.transpose(-1, -2) / math.sqrt(width // self.heads)
        out = scores.softmax(-1) @ v
        return apply(self.o_proj, out.transpose(1, 2).reshape(batch, length, width))


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate [B, L, H, E] by angles [L, E / 2]: channel i with channel i + E / 2."""
    half = x.shape[-1] // 2
    pairs = torch.complex(x[..., :half].to(angles.dtype), x[..., half:].to(angles.dtype))
    pairs = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat((pairs.real, pairs.imag), dim=-1).to(x.dtype)


class SwiGLU(nn.Module):
    def __init__(self, size: int, expansion: float) -> None:
        super().__init__()
        self.inner = math.ceil(round(expansion * size * 2 / 3) / 256) * 256
        self.gate_up_proj = casted_linear(size, 2 * self.inner)
        self.down_proj = casted_linear(self.inner, size)

    def forward(self, x: Tensor) -> Tensor:
        both = apply(self.gate_up_proj, x)
        gate, up = both[..., : self.inner], both[..., self.inner :]
        return apply(self.down_proj, gate * gate.sigmoid() * up)


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        if config.mlp_t:
            self.mlp_t = SwiGLU(config.positions, config.expansion)
        else:
            self.self_attn = Attention(config)
        self.mlp = SwiGLU(config.hidden_size, config.expansion)

    def forward(self, angles: Tensor | None, x: Tensor) -> Tensor:
        if hasattr(self, "mlp_t"):
            x = x.mT
            x = normalised(x + self.mlp_t(x)).mT
        else:
            x = normalised(x + self.self_attn(angles, x))
        return normalised(x + self.mlp(x))


class Level(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.L_layers))

    def forward(self, x: Tensor, injected: Tensor, angles: Tensor | None) -> Tensor:
        x = x + injected
        for layer in self.layers:
            x = layer(angles, x)
        return x


class Inner(nn.Module):
    H_init: Tensor
    L_init: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        d = config.hidden_size
        self.embed_tokens = CastedEmbedding(config.vocab_size, d)
        self.lm_head = casted_linear(d, config.vocab_size)
        self.q_head = casted_linear(d, 2, bias=True)
        if config.puzzle_emb_ndim:
            self.puzzle_emb = CastedSparseEmbedding(config.num_puzzle_identifiers, config.puzzle_emb_ndim)
        if config.pos_encodings == "learned":
            self.embed_pos = CastedEmbedding(config.positions, d)
        self.L_level = Level(config)
        for name in ("H_init", "L_init"):
            self.register_buffer(name, torch.randn(d).to(config.dtype))

    def angles(self) -> Tensor | None:
        config = self.config
        if config.pos_encodings != "rope" or config.mlp_t:
            return None
        size = config.hidden_size // config.num_heads
        dtype = wide(config.dtype)
        steps = torch.arange(0, size, 2, dtype=dtype) / size
        return torch.arange(config.positions, dtype=dtype)[:, None] * config.rope_theta**-steps

    def question(self, tokens: Tensor, puzzles: Tensor) -> Tensor:
        config, dtype = self.config, self.config.dtype
        x = self.embed_tokens.embedding_weight.to(dtype)[tokens]
        if config.puzzle_emb_ndim:
            rows = self.puzzle_emb.weights[puzzles].to(dtype)
            front = torch.zeros(len(rows), config.puzzle_emb_len * config.hidden_size, dtype=dtype)
            front[:, : rows.shape[1]] = rows
            x = torch.cat((front.view(len(rows), -1, config.hidden_size), x), dim=1)
        if config.pos_encodings == "learned":
            x = 0.707106781 * (x + self.embed_pos.embedding_weight.to(dtype))
        return math.sqrt(config.hidden_size) * x

    def step(self, x: Tensor, z_H: Tensor, z_L: Tensor) -> tuple[Tensor, Tensor]:
        angles = self.angles()
        for _ in range(self.config.H_cycles):
            for _ in range(self.config.L_cycles):
                z_L = self.L_level(z_L, z_H + x, angles)
            z_H = self.L_level(z_H, z_L, angles)
        return z_H, z_L


class ACT(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.inner = Inner(config)


class LossHead(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.model = ACT(config)


class Compiled(nn.Module):
    """The saved model in its wrappers. Calls return the answers after each supervision step."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self._orig_mod = LossHead(config)

    @property
    def inner(self) -> Inner:
        return self._orig_mod.model.inner

    @torch.no_grad()
    def forward(self, tokens: Tensor, puzzles: Tensor, steps: int) -> list[tuple[Tensor, Tensor]]:
        """Logits [B, L, V] and halting logits [B] of each step."""
        inner = self.inner
        x = inner.question(tokens, puzzles)
        z_H, z_L = (state.to(x.dtype).expand_as(x) for state in (inner.H_init, inner.L_init))
        found = []
        for _ in range(steps):
            z_H, z_L = inner.step(x, z_H, z_L)
            logits = apply(inner.lm_head, z_H)[:, inner.config.puzzle_emb_len :]
            found.append((logits, apply(inner.q_head, z_H[:, 0])[:, 0]))
        return found
