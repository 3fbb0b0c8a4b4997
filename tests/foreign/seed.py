"""The models of anonx3247/llm-trm: a network of ``nn.MultiheadAttention`` blocks and two loops over it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TransformerBlock(nn.Module):
    def __init__(self, d_model: int, n_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(d_model)
        self.self_attn = nn.MultiheadAttention(d_model, n_heads, dropout=dropout, batch_first=True)
        self.norm2 = nn.RMSNorm(d_model)
        self.mlp = nn.Sequential(nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model))

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        h = self.norm1(x)
        x = x + self.self_attn(h, h, h, key_padding_mask=key_padding_mask)[0]
        return x + self.mlp(self.norm2(x))


class TinyRecursiveNetwork(nn.Module):
    def __init__(self, d_model: int, n_layers: int = 2, n_heads: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TransformerBlock(d_model, n_heads, dropout) for _ in range(n_layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        padding = None if mask is None else mask == 0
        for layer in self.layers:
            x = layer(x, key_padding_mask=padding)
        return x


class RecursiveReasoningBase(nn.Module):
    net: nn.Module
    n_latent_steps: int
    n_deep_recursions: int

    def latent_recursion(self, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(self.n_latent_steps):
            z = self.net(x + y + z)
        return self.net(y + z), z

    def run_deep_recursion(
        self, x: Tensor, y: Tensor, z: Tensor, with_gradients: bool = True
    ) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            for _ in range(self.n_deep_recursions - 1):
                y, z = self.latent_recursion(x, y, z)
        with torch.set_grad_enabled(with_gradients and torch.is_grad_enabled()):
            return self.latent_recursion(x, y, z)


class TRM(RecursiveReasoningBase):
    """Maps tokens [B, L] to logits [B, L, V] with two supervision steps."""

    def __init__(
        self, vocab_size: int = 11, d_model: int = 32, n_heads: int = 4, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.n_latent_steps, self.n_deep_recursions = 2, 2
        self.input_embedding = nn.Embedding(vocab_size, d_model)
        self.net = TinyRecursiveNetwork(d_model, 2, n_heads, dropout)
        self.output_head = nn.Linear(d_model, vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.input_embedding(tokens)
        y = z = torch.zeros_like(x)
        for _ in range(2):
            y, z = self.run_deep_recursion(x, y.detach(), z.detach())
        return self.output_head(y)


class SequenceTRM(RecursiveReasoningBase):
    """Maps a context [B, L, D] to [B, L + 1, D], with a reasoning token appended after the padding."""

    def __init__(self, d_model: int = 32, n_heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.n_latent_steps, self.n_deep_recursions = 2, 3
        self.net = TinyRecursiveNetwork(d_model, 2, n_heads, dropout)
        self.reasoning_token = nn.Parameter(0.02 * torch.randn(1, 1, d_model))
        self.output_norm = nn.RMSNorm(d_model)

    def forward(self, context: Tensor, mask: Tensor | None = None) -> Tensor:
        batch = context.shape[0]
        x = torch.cat((context, self.reasoning_token.expand(batch, -1, -1)), dim=1)
        if mask is not None:
            mask = torch.cat((mask, mask.new_ones(batch, 1)), dim=1)
        return self._deep_recursion_with_mask(x, torch.zeros_like(x), torch.zeros_like(x), mask)[0]

    def _deep_recursion_with_mask(
        self, x: Tensor, y: Tensor, z: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            for _ in range(self.n_deep_recursions - 1):
                y, z = self._latent_recursion_with_mask(x, y, z, mask)
        return self._latent_recursion_with_mask(x, y, z, mask)

    def _latent_recursion_with_mask(
        self, x: Tensor, y: Tensor, z: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        for _ in range(self.n_latent_steps):
            z = self.output_norm(self.net(x + y + z, mask=mask))
        return self.output_norm(self.net(y + z, mask=mask)), z
