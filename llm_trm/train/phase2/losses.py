"""The loss of a supervision step: the distance to the target, and the halting loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_trm.choices import Halting, HaltLoss
from llm_trm.models.contexts import errors

_PER_SAMPLE = ("mse", "cosine", "relative_error", "halt_loss", "halt_probability")


class SupervisionLoss(nn.Module):
    """``mse + weight * halting loss`` of the reasoning state, as :class:`~trm_kernels.TrainingStep` calls it.

    The halting head predicts how good the state is. ``"mse"``: (sigmoid(logit) - cosine)^2. ``"bce"``: binary
    cross entropy against cosine > threshold. The cosine is a target: no gradient flows through it.

    Samples that have halted in training (``leaves``) no longer contribute to the loss from the next step on.
    The mean is still over all samples of the batch, so that it does not depend on the number of processes.

    Args:
        halt_logits: Halting logits [B] of y [B, L + 1, D'].
        batch_size: B.
        halt: Kind of the halting loss.
        weight: Weight of the halting loss.
        threshold: Threshold of ``"bce"``: a buffer, which may be refilled between steps, captured ones too.
        leaves: What ends a sample's training on this batch early: its own halting probability, the mean of
            the batch, or nothing.
    """

    threshold: Tensor
    left: Tensor

    def __init__(
        self,
        halt_logits: Callable[[Tensor], Tensor],
        batch_size: int,
        *,
        halt: HaltLoss = "mse",
        weight: float = 0.5,
        threshold: float = 0.7,
        leaves: Halting = "none",
    ) -> None:
        super().__init__()
        self.halt, self.weight, self.leaves = halt, weight, leaves
        self._halt_logits = halt_logits
        self.register_buffer("threshold", torch.tensor(threshold))
        self.register_buffer("left", torch.zeros(batch_size, dtype=torch.bool))

    def forward(
        self, y: Tensor, z: Tensor, context: Tensor, mask: Tensor, target: Tensor
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss, and sums over active samples divided by B; ``active`` is the share of those."""
        measured = errors(y[:, -1], target)
        active = (~self.left).float()
        logits = self._halt_logits(y).float()
        probability = torch.sigmoid(logits)
        cosine = measured["cosine"].detach()
        if self.halt == "bce":
            halt_loss = F.binary_cross_entropy_with_logits(
                logits, (cosine > self.threshold).float(), reduction="none"
            )
        elif self.halt == "mse":
            halt_loss = (probability - cosine).square()
        else:
            halt_loss = torch.zeros_like(probability)
        loss = (active * (measured["mse"] + self.weight * halt_loss)).mean()
        measured |= {"halt_loss": halt_loss, "halt_probability": probability}
        if self.leaves == "sample":
            self.left.logical_or_(logits.detach() > 0)
        elif self.leaves == "batch":
            self.left.logical_or_(probability.detach().mean() > 0.5)
        means = {name: (active * measured[name].detach()).mean() for name in _PER_SAMPLE}
        return loss, {**means, "active": active.mean()}

    def restart(self) -> None:
        """Forget which samples left: a new batch starts."""
        self.left.fill_(False)


def means_of(sums: Mapping[str, float], steps: float) -> dict[str, float]:
    """The means of ``sums`` over ``steps`` supervision steps, of per-sample metrics over active samples."""
    active = sums.get("active", 0.0)
    return {
        name: value / max(active if name in _PER_SAMPLE else steps, 1e-12) for name, value in sums.items()
    }
