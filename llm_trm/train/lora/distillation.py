"""Distillation of hidden states from a pass with written thinking (CODI, arXiv 2502.21074)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from llm_trm.models.causal.creation import freeze_halting


@contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """The original language model: peft's adapters, trained tokens and dropout are off."""
    training = model.training
    model.eval()
    # peft's disable_adapter inspects the whole model first, which takes longer than a pass of a small model.
    adapted = getattr(model, "base_model", None) if hasattr(model, "disable_adapter") else None
    if adapted is not None:
        adapted.disable_adapter_layers()
    try:
        yield
    finally:
        if adapted is not None:
            adapted.enable_adapter_layers()
            freeze_halting(model)
        model.train(training)


@torch.no_grad()
def teacher_states(model: Any, unwrapped: Any, ids: Tensor, mask: Tensor, at: Tensor) -> list[Tensor]:
    """States [R, D] of every layer at positions ``at`` [R], in a pass over written thinking ``ids`` [R, L].

    Args:
        model: The model to call.
        unwrapped: The same model without the wrapper of DDP or FSDP.
        mask: Attention mask [R, L].
    """
    with without_adapters(unwrapped):
        outputs = model(
            input_ids=ids, attention_mask=mask, use_trm=False, use_cache=False, output_hidden_states=True
        )
    return states_at(outputs.hidden_states, at)


def states_at(layers: Sequence[Tensor], at: Tensor, rows: Tensor | None = None) -> list[Tensor]:
    """States [R, D] of every layer but the input embeddings, of ``rows`` [R] at positions ``at`` [R]."""
    rows = torch.arange(len(at), device=at.device) if rows is None else rows
    return [layer[rows, at] for layer in layers[1:]]


def state_distance(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean over layers of the mean absolute difference, relative to the teacher's standard deviation."""
    each = [
        (ours.float() - theirs.float()).abs().mean() / theirs.float().std().clamp(min=1e-6)
        for ours, theirs in zip(student, teacher, strict=True)
    ]
    return torch.stack(each).mean()
