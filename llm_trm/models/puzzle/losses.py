"""Losses of the paper's puzzle recipe.

Source: ``models/losses.py`` of SamsungSAILMontreal/TinyRecursiveModels; stablemax is of arXiv 2501.04697.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_trm.choices import CellLoss
from llm_trm.data.puzzles.dataset import PADDING

_HALT_WEIGHT = 0.5


def widest(device: torch.device) -> torch.dtype:
    """float64, which MPS lacks: float32 there."""
    return torch.float32 if device.type == "mps" else torch.float64


def stablemax_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each cell under stablemax, in :func:`widest`; 0 where the label is 0.

    Stablemax divides s(x) by its sum, with s(x) = x + 1 for x >= 0 and 1 / (1 - x) below.

    Args:
        logits: [..., V].
        labels: [...], any integer dtype.
    """
    wide = logits.to(widest(logits.device))
    # Both branches get a gradient in torch.where: clamped, neither has a pole on the other's side.
    size = torch.where(wide < 0, 1.0 / (1.0 - wide.clamp_max(0.0)), wide.clamp_min(0.0) + 1.0)
    own = size.gather(-1, labels.long()[..., None]).squeeze(-1)
    return (size.sum(-1).log() - own.log()).masked_fill(labels == PADDING, 0.0)


def softmax_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each cell under softmax, in float32 or wider; 0 where the label is 0."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide.movedim(-1, 1), labels.long(), ignore_index=PADDING, reduction="none")


def puzzle_loss(
    logits: Tensor, halt_logits: Tensor, labels: Tensor, kind: CellLoss = "stablemax"
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The loss of a supervision step: mean cell loss of each sample, and 0.5 x halting loss, over the batch.

    The halting head learns whether all cells of the answer are right.

    Args:
        logits: [B, L, V].
        halt_logits: [B].
        labels: [B, L]; 0 where a cell counts for nothing.

    Returns:
        The loss; metrics (``cell_loss``, ``halt_loss``, ``cells``: share of right cells, ``exact``: share of
        samples without a wrong one, ``halt_right``: share of samples that the halting head judges rightly);
        which samples want to halt, bool [B].
    """
    counts = labels != PADDING
    cells = counts.sum(-1).clamp_min(1)  # a sample of padding alone divides by 1
    right = (logits.argmax(-1) == labels) & counts
    exact = right.sum(-1) == counts.sum(-1)
    losses = stablemax_cross_entropy if kind == "stablemax" else softmax_cross_entropy
    cell_loss = (losses(logits, labels).sum(-1) / cells).mean()
    halt_loss = F.binary_cross_entropy_with_logits(halt_logits, exact.to(halt_logits.dtype))
    metrics = {
        "cell_loss": cell_loss.detach(),
        "halt_loss": halt_loss.detach(),
        "cells": (right.sum(-1) / cells).mean(),
        "exact": exact.float().mean(),
        "halt_right": ((halt_logits >= 0) == exact).float().mean(),
    }
    return cell_loss + _HALT_WEIGHT * halt_loss, metrics, halt_logits.detach() > 0
