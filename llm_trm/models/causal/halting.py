"""The halting head's loss: its target is whether the answer read from the recursion's state was right."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_trm.data.reasoning import IGNORED


def halting_loss(halt_logits: Tensor, think: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of the halting head of each recursion.

    The target is 1 if every labelled token from this ``<think>`` to the next was the most likely one.

    Args:
        halt_logits: [B, rounds]; entries of samples without that round are ignored.
        think: Which tokens are ``<think>``, bool [B, L].
        logits: [B, L, V].
        labels: [B, L], -100 for no label. The logits at a position predict the label after it.

    Returns:
        The mean over recursions that are followed by a label, a scalar; zero if there are none.
    """
    rounds = halt_logits.shape[1]
    following = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    latest = think.long().cumsum(1) - 1
    counted = (following != IGNORED) & (latest >= 0)
    wrong = counted & (logits.detach().argmax(-1) != following)
    index = latest.clamp(min=0)
    zeros = torch.zeros(len(labels), rounds, device=labels.device)
    labelled = zeros.scatter_add(1, index, counted.float()) > 0
    target = (zeros.scatter_add(1, index, wrong.float()) == 0).float()
    each = F.binary_cross_entropy_with_logits(halt_logits.float(), target, reduction="none")
    return (each * labelled).sum() / labelled.sum().clamp(min=1)
