"""Losses of the paper's puzzle recipe.

Source: ``models/losses.py`` of SamsungSAILMontreal/TinyRecursiveModels; stablemax is from arXiv 2501.04697.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_trm.choices import CellLoss
from llm_trm.data.puzzles.dataset import PADDING

_HALT_WEIGHT = 0.5


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on MPS, which lacks float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def stablemax_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each cell under stablemax, in :func:`widest`; 0 where the label is 0.

    Stablemax divides s(x) by its sum, with s(x) = x + 1 for x >= 0 and 1 / (1 - x) below.

    Args:
        logits: [..., V].
        labels: [...], any integer dtype.
    """
    wide = logits.to(widest(logits.device))
    # torch.where passes gradients to both branches. The clamps keep each free of poles on the other's side.
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
    """The loss of a supervision step: each sample's mean cell loss plus 0.5 x halting loss, batch averaged.

    The halting head learns whether all cells of the answer are correct.

    Args:
        logits: [B, L, V].
        halt_logits: [B].
        labels: [B, L]; 0 at ignored cells.

    Returns:
        The loss, metrics, and which samples halt, bool [B]. The metrics are ``cell_loss``, ``halt_loss``,
        ``cells`` (fraction of correct cells), ``exact`` (fraction of samples with all cells correct) and
        ``halt_right`` (accuracy of the halting head).
    """
    counts = labels != PADDING
    cells = counts.sum(-1).clamp_min(1)  # avoids division by zero for a sample that is all padding
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
