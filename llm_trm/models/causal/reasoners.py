"""Reasoners: the states before ``<think>`` in, soft tokens for the decoder out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llm_trm.memory import require_memory
from llm_trm.models.causal.hidden_state import HiddenStateTRM, cautious_head
from llm_trm.models.causal.recurring import recur
from llm_trm.models.compression import DimensionCompressor
from llm_trm.models.sequence_trm import SequenceTRM
from trm_kernels.config import NetworkConfig

if TYPE_CHECKING:
    from llm_trm.models.causal.config import TRMConfig

_NORM_EPS = 1e-6
#: Tokens of a vocabulary that are turned to float32 at a time.
_ROWS = 8192
#: Of the mean squared norm of latents.
_RIDGE = 1e-6


@dataclass(frozen=True)
class Thought:
    """What a :class:`Reasoner` makes of B contexts.

    Attributes:
        soft_tokens: [B, K, E], in the space of the decoder's input embeddings.
        halt_logits: [B], at the last supervision step; their gradient reaches the halting head alone.
        steps: Supervision steps taken, int32 [B].
        reconstruction_error: What the compressor lost of each context, as a share of its squared norm, [B],
            no gradient. Latents have no way back to states of their own: it is what the best mixtures of
            them leave of the states.
    """

    soft_tokens: Tensor
    halt_logits: Tensor
    steps: Tensor
    reconstruction_error: Tensor


class SoftEntry(nn.Module):
    """The way of states into the space of input embeddings: a norm and a projection, both learned.

    Fed back as they are, hidden states are of no use to the decoder: they are not in that space.
    """

    def __init__(self, d_model: int, d_embedding: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(d_model, eps=_NORM_EPS)
        self.projection = nn.Linear(d_model, d_embedding, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        """States [..., D] to embeddings [..., E]."""
        return self.projection(self.norm(states))

    @torch.no_grad()
    def match(self, embeddings: Tensor) -> None:
        """Draw the projection anew, such that what enters is as large as ``embeddings`` [V, E] are."""
        size = embeddings.float().square().mean().sqrt()
        weight = torch.randn(self.projection.weight.shape) * self.projection.in_features**-0.5
        self.projection.weight.copy_(weight.to(size.device) * size)

    @torch.no_grad()
    def match_head(self, embeddings: Tensor, head: Tensor) -> None:
        """Begin where a state enters as the tokens that the output head reads in it.

        The projection becomes ``embeddings^T head``, both centred: each token's embedding counts by its
        logit. What enters is as large as the embeddings are. In the arithmetic world, 200 updates from here
        answer 90% of held-out problems, from a random projection 25%.

        Args:
            embeddings: Of the input, [V, E].
            head: Weights of the output head, [V, D].
        """
        embedding_mean, head_mean = embeddings.float().mean(0), head.float().mean(0)
        weight = torch.zeros(embeddings.shape[1], head.shape[1], device=head.device)
        for some, read in zip(embeddings.split(_ROWS), head.split(_ROWS), strict=True):
            weight += (some.float() - embedding_mean).T.to(head.device) @ (read.float() - head_mean)
        size = embeddings.float().square().mean().sqrt().to(head.device)
        weight *= size / weight.square().sum(1).mean().sqrt()
        self.projection.weight.copy_(weight)


class Reasoner(nn.Module):
    """The interface of the two reasoners.

    Args:
        config: Sizes.
        d_embedding: Width E of the decoder's input embeddings.
    """

    trm: Any

    def __init__(self, config: TRMConfig, d_embedding: int) -> None:
        super().__init__()
        self.max_steps, self.halting = config.supervision_steps, config.halting
        self.entry = SoftEntry(config.text_config.hidden_size, d_embedding)

    def forward(self, states: Tensor, mask: Tensor) -> Thought:
        """Think.

        Args:
            states: Contexts [B, L, D], L at least 1, of any float dtype.
            mask: True at valid positions [B, L], any pattern; a context may be empty.
        """
        raise NotImplementedError

    def _own(self, states: Tensor) -> Tensor:
        """``states`` as these weights are; those of a copy that peft keeps beside may be of another dtype."""
        return states.to(self.entry.projection.weight.dtype)


class LatentsReasoner(Reasoner):
    """M latents at the width D, refined by :class:`HiddenStateTRM`; each is a soft token."""

    def __init__(self, config: TRMConfig, d_embedding: int) -> None:
        super().__init__(config, d_embedding)
        self.trm = HiddenStateTRM(
            config.text_config.hidden_size,
            config.num_latents,
            config.n_layers,
            config.n_heads,
            config.compression_heads,
            config.n_latent_steps,
            config.n_deep_recursions,
            config.supervision_steps,
            config.dropout,
            halting=config.halting,
        )

    def forward(self, states: Tensor, mask: Tensor) -> Thought:
        """See :meth:`Reasoner.forward`."""
        states = self._own(states)
        latents = self.trm.compressor(states, mask)
        recurred = self.trm.refine(latents)
        lost = _out_of_reach(states, mask, latents)
        return Thought(self.entry(recurred.y), recurred.halt_logits, recurred.steps, lost)


class SequenceReasoner(Reasoner):
    """States narrowed to D', one reasoning state behind them, widened again to K soft tokens."""

    def __init__(self, config: TRMConfig, d_embedding: int) -> None:
        super().__init__(config, d_embedding)
        width = config.d_compressed
        self.compressor = DimensionCompressor(config.text_config.hidden_size, width)
        self.trm = SequenceTRM(
            width,
            config.n_layers,
            config.n_heads,
            config.n_latent_steps,
            config.n_deep_recursions,
            config.dropout,
        )
        self.trm.halt_head = cautious_head(width)
        self.soft_tokens = config.soft_tokens
        if self.soft_tokens > 1:
            self.expansion = nn.Linear(width, self.soft_tokens * width, bias=False)

    def forward(self, states: Tensor, mask: Tensor) -> Thought:
        """See :meth:`Reasoner.forward`."""
        # Padding may hold anything, NaN too.
        states = self._own(states).masked_fill(~mask[..., None], 0.0)
        compressed = self.compressor(states)
        x, _, _, extended = self.trm.setup_for_steps(compressed, mask)
        recurred = recur(self.trm, x, extended, max_steps=self.max_steps, halting=self.halting)
        state = recurred.y[:, -1:]
        if self.soft_tokens > 1:
            # The expansion's rows are what a soft token adds to the reasoning state that all share.
            state = state + self.expansion(state).unflatten(-1, (self.soft_tokens, -1)).squeeze(1)
        soft = self.entry(self.compressor.decompress(state))
        return Thought(soft, recurred.halt_logits, recurred.steps, self._lost(states, compressed))

    @torch.no_grad()
    def _lost(self, states: Tensor, compressed: Tensor) -> Tensor:
        error = (self.compressor.decompress(compressed) - states).float().square().sum((1, 2))
        return error / states.float().square().sum((1, 2)).clamp(min=torch.finfo(torch.float32).tiny)


@torch.no_grad()
def _out_of_reach(states: Tensor, mask: Tensor, latents: Tensor) -> Tensor:
    """What no mixture of the latents [B, M, D] gives of the states [B, L, D], as a share, [B].

    Nothing as large as the states is made beside them: contexts may have 65k of them.
    """
    with torch.autocast(states.device.type, enabled=False):
        states, latents = states.float(), latents.float()
        gram = latents @ latents.mT  # [B, M, M]
        # Latents that are nearly alike are one: a direction a thousandth as strong as the rest is none.
        ridge = _RIDGE * gram.diagonal(dim1=1, dim2=2).mean(1)
        gram.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
        # Padding may hold anything, NaN too.
        alike = (latents @ states.mT).masked_fill(~mask[:, None], 0.0)  # [B, M, L]
        mixtures = torch.cholesky_solve(alike, torch.linalg.cholesky_ex(gram).L)
        given = (alike * mixtures).sum((1, 2)) + ridge * mixtures.square().sum((1, 2))
        whole = torch.linalg.vector_norm(states, dim=2).masked_fill(~mask, 0.0).square().sum(1)
        return (whole - given).clamp(min=0.0) / whole.clamp(min=torch.finfo(torch.float32).tiny)


def build_reasoner(config: TRMConfig, d_embedding: int) -> Reasoner:
    """The reasoner that ``config`` describes, newly initialised."""
    if torch.get_default_device().type != "meta":
        require_memory(
            4 * _numbers(config),
            "the recursion",
            "choose fewer layers, latents or soft tokens, or less width",
        )
    kind = LatentsReasoner if config.reasoner == "latents" else SequenceReasoner
    return kind(config, d_embedding)


def _numbers(config: TRMConfig) -> int:
    """Numbers of the recursion's network and of what its latents or soft tokens come from: most of them."""
    if config.reasoner == "latents":
        width, entry = config.text_config.hidden_size, config.num_latents * config.text_config.hidden_size
    else:
        width, entry = config.d_compressed, config.soft_tokens * config.d_compressed**2
    return NetworkConfig(width, config.n_layers, config.n_heads).parameters + entry
