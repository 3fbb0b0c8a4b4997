"""``TRM``: the puzzle model of anonx3247/llm-trm, running on the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_trm.choices import Halting
from llm_trm.ranges import DEPTH, NO_OR_DEPTH, VOCABULARY, require_in
from trm_kernels import AsyncCount, RecursionMixin, TinyRecursiveNetwork, halting_recursion
from trm_kernels.config import FLOAT32_EPS


@dataclass(frozen=True)
class Answers:
    """Result of :meth:`TRM.reason`.

    Attributes:
        logits: Token logits when each sample halted [B, L, V].
        steps: Supervision steps that each sample took, int32 [B].
    """

    logits: Tensor
    steps: Tensor


class TRM(RecursionMixin, nn.Module):
    """Maps tokens [B, L] to logits [B, L, V], refined by supervision steps from zero states.

    Parameters have the names and shapes of anonx3247/llm-trm (``src/models/trm.py``), so state dicts load
    both ways. There are four differences. A sample halts by its own probability instead of its batch's mean
    (``halting="batch"`` restores that). The host learns of halting one step late, so it never stalls the
    device. The halting loss uses logits (the original clamps probabilities at 1e-7 and has no gradient
    beyond). The norms' epsilon is 1.19e-7 in every dtype.

    The states of the original are unbounded: with n = 6 they grow 8-fold per recursion, and after 16
    supervision steps of two recursions the logits reach 1e28, so the model cannot learn. ``output_norm=True``
    normalises after every call of the network, as in the same author's ``SequenceTRM``, and adds one
    parameter tensor.

    Args:
        vocab_size: Number of tokens V.
        d_model: Width D.
        n_layers, n_heads: Number of blocks of the network, and of attention heads per block.
        dropout: Dropout probability of attention weights in training.
        n_latent_steps: Latent steps n per recursion.
        n_deep_recursions: Recursions T per supervision step, including the one with gradients. (The original
            documents it as T - 1, but runs ``n_deep_recursions - 1`` without gradients and one with.)
        n_supervision_steps: Maximum number of supervision steps.
        halting: Which probability ends a sample's recursion above 0.5: its own (``"sample"``), the batch's
            mean (``"batch"``), or none (``"none"``).
        output_norm: Whether to normalise after every call of the network.
        backend: As for :class:`~trm_kernels.TinyRecursiveNetwork`.

    Raises:
        ValueError: A setting is invalid.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int = 512,
        n_layers: int = 2,
        n_heads: int = 8,
        dropout: float = 0.0,
        n_latent_steps: int = 6,
        n_deep_recursions: int = 2,
        n_supervision_steps: int = 16,
        *,
        halting: Halting = "sample",
        output_norm: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        require_in(DEPTH, "n_supervision_steps", n_supervision_steps)
        require_in(NO_OR_DEPTH, "n_latent_steps", n_latent_steps)
        require_in(DEPTH, "n_deep_recursions", n_deep_recursions)
        require_in(VOCABULARY, "vocab_size", vocab_size)
        if halting not in get_args(Halting):
            raise ValueError(f"halting must be one of {get_args(Halting)}, not {halting!r}")
        self.d_model = d_model
        self.n_latent_steps, self.n_deep_recursions = n_latent_steps, n_deep_recursions
        self.n_supervision_steps, self.halting = n_supervision_steps, halting
        self.input_embedding = nn.Embedding(vocab_size, d_model)
        self.net = TinyRecursiveNetwork(d_model, n_layers, n_heads, dropout, backend=backend)
        self.output_head = nn.Linear(d_model, vocab_size, bias=False)
        self.halt_head = nn.Linear(d_model, 1)
        if output_norm:
            self.output_norm = nn.RMSNorm(d_model, eps=FLOAT32_EPS)
        for module in (self.input_embedding, self.output_head, self.halt_head):
            nn.init.normal_(module.weight, std=0.02)

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed tokens [B, L] of any integer dtype: [B, L, D]."""
        return self.input_embedding(tokens.long())

    def halt_logits(self, y: Tensor) -> Tensor:
        """Halting logits [B] of y [B, L, D]; a sample halts if its logit is positive."""
        return self.halt_head(y.mean(dim=1)).squeeze(-1)

    def forward(self, tokens: Tensor, return_all_steps: bool = False) -> Tensor | list[Tensor]:
        """Run ``n_supervision_steps`` supervision steps; in evaluation mode, samples halt early.

        States are detached between supervision steps. If gradients are disabled and only the last logits
        are requested, halted samples are removed from the batch to save computation.

        Args:
            tokens: Questions, integers [B, L].
            return_all_steps: Whether to return the logits of every supervision step. A halted sample's
                logits no longer change.

        Returns:
            Logits [B, L, V] at each sample's last step, or a list of the logits of every step.
        """
        if self.training or (self.halting == "none" and torch.is_grad_enabled()):
            return self._fixed_steps(tokens, return_all_steps)
        if return_all_steps or torch.is_grad_enabled():
            steps = self._halting_steps(tokens)
            return steps if return_all_steps else steps[-1]
        return self.reason(tokens).logits

    def _fixed_steps(self, tokens: Tensor, return_all_steps: bool) -> Tensor | list[Tensor]:
        x = self.embed(tokens)
        y = z = torch.zeros_like(x)
        steps = []
        for number in range(1, self.n_supervision_steps + 1):
            wanted = return_all_steps or number == self.n_supervision_steps
            y, z = self.deep_recursion(x, y.detach(), z.detach(), with_gradients=wanted)
            if wanted:
                steps.append(self.output_head(y))
        return steps if return_all_steps else steps[-1]

    def _halting_steps(self, tokens: Tensor) -> list[Tensor]:
        x = self.embed(tokens)
        y = z = torch.zeros_like(x)
        running = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
        left = AsyncCount()
        steps: list[Tensor] = []
        for _ in range(self.n_supervision_steps):
            y, z = self.deep_recursion(x, y.detach(), z.detach())
            logits = self.output_head(y)
            steps.append(torch.where(running[:, None, None], logits, steps[-1]) if steps else logits)
            running = running & ~self._halts(y)
            if left.push(running.sum()) == 0:
                # The count is one step late, so all samples had halted before this step.
                return steps[:-1]
        return steps

    @torch.no_grad()
    def reason(self, tokens: Tensor, max_steps: int | None = None) -> Answers:
        """Recur until each sample halts according to ``halting``, without gradients.

        Args:
            tokens: Questions, integers [B, L].
            max_steps: Maximum number of supervision steps; ``n_supervision_steps`` by default.
        """
        x = self.embed(tokens)

        def step(x: Tensor, y: Tensor, z: Tensor) -> tuple[dict[str, Tensor], Tensor]:
            y, z = self.deep_recursion(x, y, z, with_gradients=False)
            return {"y": y, "z": z}, self._halts(y)

        result = halting_recursion(
            step,
            {"x": x, "y": torch.zeros_like(x), "z": torch.zeros_like(x)},
            self.n_supervision_steps if max_steps is None else max_steps,
            compact=self.halting == "sample",
        )
        return Answers(self.output_head(result.state["y"]), result.exit_steps)

    def compute_loss(self, x: Tensor, y: Tensor, use_act: bool = True, *, ignore_index: int = -100) -> Tensor:
        """Sum over supervision steps of cross entropy + 0.5 x halting loss, averaged over samples.

        The halting head learns whether all cells of the answer are correct (binary cross entropy). With
        ``halting="sample"`` a halted sample adds no further loss, so its loss does not depend on its batch.
        With ``"batch"`` the loss equals the original's.

        Args:
            x: Questions, integers [B, L].
            y: Answers, integers [B, L].
            use_act: Whether to train halting and to halt.
            ignore_index: Label of ignored cells.

        Returns:
            The loss, a scalar in float32 or wider.
        """
        embedded, labels = self.embed(x), y.long()
        answer = latent = torch.zeros_like(embedded)
        running = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
        left = AsyncCount()
        total = embedded.new_zeros((), dtype=torch.promote_types(embedded.dtype, torch.float32))
        for _ in range(self.n_supervision_steps):
            answer, latent = self.deep_recursion(embedded, answer.detach(), latent.detach())
            losses = self._losses(answer, labels, use_act, ignore_index)
            total = total + torch.where(running, losses, 0.0).mean()
            if use_act and self.halting != "none":
                running = running & ~self._halts(answer.detach())
                if left.push(running.sum()) == 0:
                    break
        return total

    def _losses(self, y: Tensor, labels: Tensor, use_act: bool, ignore_index: int) -> Tensor:
        """Loss of each sample [B] after one supervision step."""
        logits = self.output_head(y)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        counted = labels != ignore_index
        cells = F.cross_entropy(wide.transpose(1, 2), labels, reduction="none", ignore_index=ignore_index)
        losses = cells.sum(dim=1) / counted.sum(dim=1).clamp_min(1)
        if not use_act:
            return losses
        right = ((logits.argmax(dim=-1) == labels) | ~counted).all(dim=1)
        # Use logits: the loss of a probability has no gradient where the sigmoid rounds to 0 or 1.
        halt = self.halt_logits(y).to(wide.dtype)
        return losses + 0.5 * F.binary_cross_entropy_with_logits(halt, right.to(wide.dtype), reduction="none")

    @torch.no_grad()
    def _halts(self, y: Tensor) -> Tensor:
        """Which samples halt after a step that returned y, bool [B]."""
        logits = self.halt_logits(y)
        if self.halting == "batch":
            return (torch.sigmoid(logits).mean() > 0.5).expand(len(logits))
        return (logits > 0) & (self.halting == "sample")


def create_trm_model(vocab_size: int, d_model: int = 512, **options: Any) -> TRM:
    """Create a :class:`TRM`; ``options`` are its other arguments."""
    return TRM(vocab_size, d_model, **options)
