"""The model of dino65-dev/TRM-Tiny-Recursive-Model with a fixed RoPE and, for comparison, the original."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-8) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() * self.weight


class RotaryEmbedding(nn.Module):
    """Tables in NeoX layout; rotates [B, L, H, E] along L."""

    inv_freq: Tensor
    cos_cached: Tensor
    sin_cached: Tensor

    def __init__(self, dim: int, max_seq_len: int = 512, base: int = 10000) -> None:
        super().__init__()
        self.base = base
        self.register_buffer("inv_freq", base ** (-torch.arange(0, dim, 2).float() / dim))
        angle = torch.outer(torch.arange(max_seq_len).float(), self.inv_freq).repeat(1, 2)
        self.register_buffer("cos_cached", angle.cos(), persistent=False)
        self.register_buffer("sin_cached", angle.sin(), persistent=False)

    def forward(self, x: Tensor, seq_len: int) -> Tensor:
        half = x.shape[-1] // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        return x * self.cos_cached[:seq_len, None] + turned * self.sin_cached[:seq_len, None]


class InterleavedRotaryEmbedding(RotaryEmbedding):
    """Tables in NeoX layout with rotation of neighbouring channels, the original's mixture of layouts."""

    def forward(self, x: Tensor, seq_len: int) -> Tensor:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        return x * self.cos_cached[:seq_len, None] + turned * self.sin_cached[:seq_len, None]


class FaultyRotaryEmbedding(InterleavedRotaryEmbedding):
    """As published: applies the tables [L, E] to the heads of [B, L, H, E], which only works for L = H."""

    def forward(self, x: Tensor, seq_len: int) -> Tensor:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        return x * self.cos_cached[:seq_len] + turned * self.sin_cached[:seq_len]


class MultiHeadAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, dropout: float, rope: type[RotaryEmbedding]) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(dim, dim, bias=False) for _ in range(4)
        )
        self.dropout = nn.Dropout(dropout)
        self.rope = rope(dim // num_heads)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        q, k, v = (
            project(x).view(batch, length, self.num_heads, -1)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.rope(q, length), self.rope(k, length)
        scores = torch.einsum("blhe,bmhe->bhlm", q, k) * (dim // self.num_heads) ** -0.5
        out = torch.einsum("bhlm,bmhe->blhe", self.dropout(scores.softmax(dim=-1)), v)
        return self.o_proj(out.reshape(batch, length, dim))


class MLPSequenceMixer(nn.Module):
    def __init__(self, seq_len: int) -> None:
        super().__init__()
        self.mlp1 = nn.Linear(seq_len, 4 * seq_len)
        self.mlp2 = nn.Linear(4 * seq_len, seq_len)
        self.activation = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp2(self.activation(self.mlp1(x.transpose(1, 2)))).transpose(1, 2)


class SwiGLU(nn.Module):
    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    def __init__(self, dim: int, mixer: nn.Module) -> None:
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.norm2 = RMSNorm(dim)
        self.mixer = mixer
        self.ffn = SwiGLU(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class TinyRecursiveModel(nn.Module):
    """Maps tokens [B, L] to logits [B, L, V] with one supervision step of two cycles."""

    def __init__(
        self,
        vocab_size: int = 11,
        dim: int = 32,
        num_heads: int = 4,
        seq_len: int = 9,
        use_mlp_mixer: bool = False,
        dropout: float = 0.0,
        rope: type[RotaryEmbedding] = RotaryEmbedding,
    ) -> None:
        super().__init__()
        self.seq_len, self.n_recursions, self.t_cycles = seq_len, 2, 2
        self.embed_input = nn.Embedding(vocab_size, dim)
        self.init_y = nn.Parameter(0.02 * torch.randn(1, seq_len, dim))
        self.init_z = nn.Parameter(0.02 * torch.randn(1, seq_len, dim))
        self.network = nn.ModuleList(
            TransformerBlock(
                dim,
                MLPSequenceMixer(seq_len)
                if use_mlp_mixer
                else MultiHeadAttention(dim, num_heads, dropout, rope),
            )
            for _ in range(2)
        )
        self.output_head = nn.Linear(dim, vocab_size, bias=False)

    def apply_network(self, x: Tensor) -> Tensor:
        for block in self.network:
            x = block(x)
        return x

    def one_recursion_cycle(
        self, x: Tensor, y: Tensor, z: Tensor, include_input: bool = True
    ) -> tuple[Tensor, Tensor]:
        for _ in range(self.n_recursions):
            z = self.apply_network(x + y + z if include_input else y + z)
        return self.apply_network(y + z), z

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_input(tokens)
        y, z = self.init_y.expand_as(x), self.init_z.expand_as(x)
        with torch.no_grad():
            for _ in range(self.t_cycles - 1):
                y, z = self.one_recursion_cycle(x, y, z)
        return self.output_head(self.one_recursion_cycle(x, y, z)[0])
