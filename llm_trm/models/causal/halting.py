"""What teaches a halting head when to stop: whether the answer read from the recursion's state was right."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_trm.data.reasoning import IGNORED


def halting_loss(halt_logits: Tensor, think: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of the halting head of each recursion.

    Its target: every labelled token from ``<think>`` to the next one was the likeliest.

    Args:
        halt_logits: [B, rounds]; those of samples without that round are not read.
        think: Which tokens are ``<think>``, bool [B, L].
        logits: [B, L, V].
        labels: [B, L], -100 where there is none; a position's logits are for the label behind it.

    Returns:
        The mean over recursions with a label behind them: a scalar, zero if there is none.
    """
    rounds = halt_logits.shape[1]
    following = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    latest = think.long().cumsum(1) - 1
    counted = (following != IGNORED) & (latest >= 0)
    wrong = counted & (logits.detach().argmax(-1) != following)
    place = latest.clamp(min=0)
    zeros = torch.zeros(len(labels), rounds, device=labels.device)
    labelled = zeros.scatter_add(1, place, counted.float()) > 0
    target = (zeros.scatter_add(1, place, wrong.float()) == 0).float()
    each = F.binary_cross_entropy_with_logits(halt_logits.float(), target, reduction="none")
    return (each * labelled).sum() / labelled.sum().clamp(min=1)
