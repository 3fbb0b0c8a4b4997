"""The eager network that this project replaces: a reimplementation of anonx3247/llm-trm's block.

It keeps the original's inefficiency, which is what matters here: ``nn.MultiheadAttention`` returns its
attention weights (the default), which rules out PyTorch's fused attention.
"""

from __future__ import annotations

from torch import Tensor, nn

from trm_kernels.config import NetworkConfig


class OriginalBlock(nn.Module):
    """Pre-norm block with the parameter names of the seed family."""

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(d_model)
        self.self_attn = nn.MultiheadAttention(d_model, n_heads, batch_first=True)
        self.norm2 = nn.RMSNorm(d_model)
        self.mlp = nn.Sequential(nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model))

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, L, D] to [B, L, D]."""
        h = self.norm1(x)
        x = x + self.self_attn(h, h, h)[0]
        return x + self.mlp(self.norm2(x))


class OriginalNetwork(nn.Module):
    """A stack of original blocks, which loads the state dict of a seed-family network."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            OriginalBlock(config.d_model, config.n_heads) for _ in range(config.n_layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, L, D] to [B, L, D]."""
        for layer in self.layers:
            x = layer(x)
        return x
