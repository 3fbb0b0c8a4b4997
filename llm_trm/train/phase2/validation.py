"""Validation of a SequenceTRM."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llm_trm.models.contexts import Contexts, errors
from llm_trm.models.sequence_trm import SequenceTRM

#: Names of the metrics that :func:`validation_sums` adds up.
MEASURED = (
    "mse",
    "cosine",
    "relative_error",
    "halted_mse",
    "halted_cosine",
    "halted_relative_error",
    "halt_steps",
)


def validation_sums(
    model: SequenceTRM, contexts: Contexts, samples: Sequence[int], batch_size: int, max_steps: int
) -> list[float]:
    """Sums of :data:`MEASURED` over ``samples``, followed by the number of samples.

    The first three are measured after ``max_steps`` supervision steps, those that start with ``halted`` at
    the step where the sample's own halting logit ends the recursion, on average after ``halt_steps``.
    """
    device = model.reasoning_token.device
    sums = torch.zeros(len(MEASURED) + 1, dtype=torch.float64)
    lengths = contexts.lengths
    ordered = sorted(samples, key=lengths.__getitem__)
    for start in range(0, len(ordered), batch_size):
        batch = contexts.batch(ordered[start : start + batch_size])
        context, mask, target = (tensor.to(device) for tensor in batch)
        full = model.reason(context, mask, max_steps=max_steps, halting="none")
        halted = model.reason(context, mask, max_steps=max_steps, halting="sample")
        measured = [
            *errors(full.state, target).values(),
            *errors(halted.state, target).values(),
            halted.steps,
            torch.ones_like(halted.steps),
        ]
        sums += torch.stack([value.float() for value in measured]).cpu().double().sum(dim=1)
    return sums.tolist()
