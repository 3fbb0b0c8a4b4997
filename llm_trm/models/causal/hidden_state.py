"""``HiddenStateTRM``: a recursion over M latents at the full width of a language model's states."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llm_trm.choices import Halting
from llm_trm.errors import InputError
from llm_trm.models.causal.recurring import Recurred, recur
from llm_trm.models.compression import LatentAttentionCompressor
from llm_trm.ranges import DEPTH, NO_OR_DEPTH, require_in
from trm_kernels import RecursionMixin, TinyRecursiveNetwork
from trm_kernels.config import FLOAT32_EPS


class HiddenStateTRM(RecursionMixin, nn.Module):
    """Gathers states [B, L, D] in M latents and refines these by recursion.

    The arguments are those of the class of this name in anonx3247/llm-trm. What differs: states are valid or
    padding; each sample halts for itself; and every call of the network is followed by a norm. Without it
    the states grow by a factor of about 8 a recursion, so that after the 24 of the defaults the share of the
    latents in the answer, and with it the gradient of the compressor, is rounded away.

    Args:
        hidden_size: Width D.
        num_latents: M.
        n_layers, n_heads: Blocks of the network, and attention heads of a block.
        compression_heads: Attention heads of the compressor.
        n_latent_steps: Latent steps n of a recursion.
        n_deep_recursions: Recursions T of a supervision step.
        n_supervision_steps: Supervision steps at most.
        dropout: Probability of dropping an attention weight in training.
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

    def reason(self, states: Tensor, mask: Tensor | None = None) -> Recurred:
        """Refine the latents of ``states`` [B, L, D], valid where ``mask`` [B, L] is 1: y is [B, M, D]."""
        return self.refine(self.compressor(states, mask))

    def refine(self, latents: Tensor) -> Recurred:
        """The supervision steps of :meth:`reason`, from what the compressor made: latents [B, M, D]."""
        return recur(self, latents, max_steps=self.n_supervision_steps, halting=self.halting)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        return_all_steps: bool = False,
    ) -> Tensor | list[Tensor]:
        """The states with their first M positions dropped and the M latents appended.

        Args:
            hidden_states: [B, L, D].
            attention_mask: 1 at valid positions [B, L].
            return_all_steps: Whether to return the result of every supervision step, none left out by
                halting; each has a gradient of its own.

        Returns:
            [B, L, D], or a list of these.

        Raises:
            InputError: L is not above M.
        """
        length = hidden_states.shape[1]
        if length <= self.num_latents:
            raise InputError(
                f"{length} positions cannot give up {self.num_latents} for as many latents: lower num_latents"
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
    """A halting head that stops nobody before it has learned when to: its probability starts at 0.7%."""
    head = nn.Linear(width, 1)
    nn.init.zeros_(head.weight)
    nn.init.constant_(head.bias, -5.0)
    return head
