"""``HiddenStateTRM``: a recursion over M latents of the full width of a language model's states."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llm_trm.choices import Halting
from llm_trm.errors import InputError
from llm_trm.models.causal.recurring import RecurResult, recur
from llm_trm.models.compression import LatentAttentionCompressor
from llm_trm.ranges import DEPTH, NO_OR_DEPTH, require_in
from trm_kernels import RecursionMixin, TinyRecursiveNetwork
from trm_kernels.config import FLOAT32_EPS


class HiddenStateTRM(RecursionMixin, nn.Module):
    """Compresses states [B, L, D] to M latents and refines them by recursion.

    The arguments are those of the class with this name in anonx3247/llm-trm. There are three differences:
    a mask separates valid states from padding, each sample halts on its own, and a norm follows every call
    of the network. Without the norm the states grow by a factor of about 8 per recursion. After the default
    24 recursions, the latents' contribution to the answer, and with it the compressor's gradient, would be
    lost to rounding.

    Args:
        hidden_size: Width D.
        num_latents: Number of latents M.
        n_layers, n_heads: Number of blocks of the network, and of attention heads per block.
        compression_heads: Number of attention heads of the compressor.
        n_latent_steps: Latent steps n per recursion.
        n_deep_recursions: Recursions T per supervision step.
        n_supervision_steps: Maximum number of supervision steps.
        dropout: Dropout probability of attention weights in training.
        halting: As for :meth:`~llm_trm.models.sequence_trm.SequenceTRM.reason`.
        backend: As for :class:`~trm_kernels.TinyRecursiveNetwork`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_latents: int = 256,
        n_layers: int = 2,
        n_heads: int = 8,
        compression_heads: int = 8,
        n_latent_steps: int = 6,
        n_deep_recursions: int = 3,
        n_supervision_steps: int = 8,
        dropout: float = 0.1,
        *,
        halting: Halting = "sample",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        require_in(NO_OR_DEPTH, "n_latent_steps", n_latent_steps)
        require_in(DEPTH, "n_deep_recursions", n_deep_recursions)
        require_in(DEPTH, "n_supervision_steps", n_supervision_steps)
        self.hidden_size, self.num_latents = hidden_size, num_latents
        self.n_latent_steps, self.n_deep_recursions = n_latent_steps, n_deep_recursions
        self.n_supervision_steps, self.halting = n_supervision_steps, halting
        self.compressor = LatentAttentionCompressor(hidden_size, num_latents, compression_heads)
        self.net = TinyRecursiveNetwork(hidden_size, n_layers, n_heads, dropout, backend=backend)
        self.output_norm = nn.RMSNorm(hidden_size, eps=FLOAT32_EPS)
        self.halt_head = cautious_head(hidden_size)

    def halt_logits(self, y: Tensor) -> Tensor:
        """Halting logits [B] of y [B, M, D]; a sample may stop where its logit is positive."""
        return self.halt_head(y.mean(dim=1)).squeeze(-1)

    def reason(self, states: Tensor, mask: Tensor | None = None) -> RecurResult:
        """Refine the latents of ``states`` [B, L, D], which are valid where ``mask`` [B, L] is 1.

        The result's ``y`` is [B, M, D].
        """
        return self.refine(self.compressor(states, mask))

    def refine(self, latents: Tensor) -> RecurResult:
        """Run the supervision steps of :meth:`reason` on the compressor's latents [B, M, D]."""
        return recur(self, latents, max_steps=self.n_supervision_steps, halting=self.halting)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        return_all_steps: bool = False,
    ) -> Tensor | list[Tensor]:
        """Drop the first M positions of the states and append the M latents.

        Args:
            hidden_states: [B, L, D].
            attention_mask: 1 at valid positions [B, L].
            return_all_steps: Return the result of every supervision step, without halting. Each result has
                its own gradient.

        Returns:
            [B, L, D], or a list of such tensors.

        Raises:
            InputError: L is not greater than M.
        """
        length = hidden_states.shape[1]
        if length <= self.num_latents:
            raise InputError(
                f"{length} positions are too few to replace {self.num_latents} with latents: "
                "lower num_latents"
            )
        kept = hidden_states[:, self.num_latents :]
        if not return_all_steps:
            return torch.cat((kept, self.reason(hidden_states, attention_mask).y), dim=1)
        x = self.compressor(hidden_states, attention_mask)
        y = z = torch.zeros_like(x)
        windows = []
        for _ in range(self.n_supervision_steps):
            y, z = self.deep_recursion(x, y.detach(), z.detach())
            windows.append(torch.cat((kept, y), dim=1))
        return windows


def cautious_head(width: int) -> nn.Linear:
    """A halting head that stops no sample until it is trained: its initial probability is 0.7%."""
    head = nn.Linear(width, 1)
    nn.init.zeros_(head.weight)
    nn.init.constant_(head.bias, -5.0)
    return head
