"""What an evaluation of ``llm-trm train lora`` measures, per sample, in one teacher-forced pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llm_trm.data.reasoning import IGNORED

#: Columns of :func:`sample_measures`.
_COLUMNS = (
    *("think_loss", "think_tokens", "answer_loss", "answer_tokens"),
    *("wants_think", "writes_think", "labelled", "right"),
    *("thoughts", "steps", "halting_loss", "lost"),
)


def sample_measures(outputs: Any, batch: dict[str, Tensor], think: int) -> Tensor:
    """Measures of each sample of a batch, [B, measures].

    Args:
        outputs: A ``TRMCausalLMOutput``.
        batch: A batch of a :class:`~llm_trm.train.lora.data.Collator`.
        think: Id of ``<think>``.
    """
    labels = F.pad(batch["labels"], (0, 1), value=IGNORED)[:, 1:]
    logits = outputs.logits.float()
    losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    labelled, thinking = labels != IGNORED, labels == think
    said = logits.argmax(-1)
    places = torch.arange(labels.shape[1], device=labels.device)
    answer = labelled & (places >= batch["answer_at"][:, None])
    first = labelled & (labelled.long().cumsum(1) == 1)
    whole = ((said == labels) | ~answer).all(1) & answer.any(1)
    batch_size = len(labels)
    zeros = logits.new_zeros(batch_size)
    steps = zeros if outputs.trm_steps is None else outputs.trm_steps.sum(1)
    thoughts = zeros if outputs.trm_steps is None else (outputs.trm_steps > 0).sum(1)
    halting = zeros if outputs.halting_loss is None else outputs.halting_loss.expand(batch_size)
    lost = outputs.reconstruction_error
    values = {
        "think_loss": (losses * thinking).sum(1),
        "think_tokens": thinking.sum(1),
        "answer_loss": (losses * (labelled & ~thinking)).sum(1),
        "answer_tokens": (labelled & ~thinking).sum(1),
        "wants_think": (first & thinking).any(1),
        "writes_think": (first & (said == think)).any(1),
        "labelled": labelled.any(1),
        "right": whole,
        "thoughts": thoughts,
        "steps": steps,
        "halting_loss": halting,
        "lost": zeros + float("nan") if lost is None else lost.expand(batch_size),
    }
    return torch.stack([values[name].float() for name in _COLUMNS], dim=1)


def summary(measures: np.ndarray[Any, Any]) -> dict[str, float]:
    """Means of :func:`sample_measures` [N, measures] over samples or tokens; those over none are absent.

    ``loss`` weighs all tokens that the model is to write equally, and excludes the halting head.
    """
    of = {name: measures[:, place].astype(float) for place, name in enumerate(_COLUMNS)}
    total = {name: values.sum() for name, values in of.items()}
    wants, thought = of["wants_think"] > 0, of["thoughts"] > 0
    # If the prompt ends in <think>, writing it is neither wanted nor needless.
    plain = (of["labelled"] > 0) & ~wants & ~thought
    tokens = total["think_tokens"] + total["answer_tokens"]
    shares = {
        "loss": (total["think_loss"] + total["answer_loss"], tokens),
        "think_loss": (total["think_loss"], total["think_tokens"]),
        "answer_loss": (total["answer_loss"], total["answer_tokens"]),
        "answer_accuracy": (total["right"], total["labelled"]),
        "think_rate": (of["writes_think"][wants].sum(), wants.sum()),
        "needless_think_rate": (of["writes_think"][plain].sum(), plain.sum()),
        "trm_steps": (total["steps"], total["thoughts"]),
        "halting_loss": ((of["halting_loss"] * thought).sum(), thought.sum()),
        "reconstruction_error": (np.nansum(of["lost"]), np.isfinite(of["lost"]).sum()),
    }
    return {name: float(sum_ / count) for name, (sum_, count) in shares.items() if count}
