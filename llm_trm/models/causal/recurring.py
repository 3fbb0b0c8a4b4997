"""Runs the supervision steps of a recursion with gradients through the last step only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llm_trm.choices import Halting
from trm_kernels import HaltingResult, halting_recursion


class Recurrent(Protocol):
    """A deep recursion with a halting head."""

    def deep_recursion(
        self, x: Tensor, y: Tensor, z: Tensor, mask: Tensor | None = None, *, with_gradients: bool = True
    ) -> tuple[Tensor, Tensor]:
        """New y and z [B, L, D]."""

    def halt_logits(self, y: Tensor) -> Tensor:
        """[B], positive where the sample may stop."""


@dataclass(frozen=True)
class RecurResult:
    """Result of :func:`recur`.

    Attributes:
        y: [B, L, D], with the gradient of the last supervision step.
        halt_logits: [B]; their gradient reaches only the halting head.
        steps: Supervision steps that each sample took, int32 [B].
    """

    y: Tensor
    halt_logits: Tensor
    steps: Tensor


def recur(
    model: Recurrent, x: Tensor, mask: Tensor | None = None, *, max_steps: int, halting: Halting
) -> RecurResult:
    """Take up to ``max_steps`` supervision steps, starting from zeros.

    y and z are detached between steps, so only a sample's last step needs a gradient. With halting, the steps
    first run without gradients, and then each sample's last step runs again with them. The values are the
    same in training and inference.

    Args:
        x: [B, L, D].
        mask: 1 at valid positions [B, L].
        halting: As for :meth:`~llm_trm.models.sequence_trm.SequenceTRM.reason`.
    """
    y = torch.zeros_like(x)
    z = torch.zeros_like(x)
    steps = torch.full((len(x),), max_steps, dtype=torch.int32, device=x.device)
    if halting == "none":
        for _ in range(max_steps - 1):
            with torch.no_grad():
                y, z = model.deep_recursion(x, y, z, mask, with_gradients=False)
    elif not torch.is_grad_enabled():
        halted = _until_halted(model, x, y, z, mask, max_steps, halting)
        return RecurResult(halted.state["y"], halted.state["logits"], halted.exit_steps)
    elif max_steps > 1:
        halted = _until_halted(model, x.detach(), y, z, mask, max_steps - 1, halting)
        before = halted.halted[:, None, None]
        y = torch.where(before, halted.state["y_before"], halted.state["y"])
        z = torch.where(before, halted.state["z_before"], halted.state["z"])
        steps = torch.where(halted.halted, halted.exit_steps, steps)
    y, _ = model.deep_recursion(x, y, z, mask)
    return RecurResult(y, model.halt_logits(y.detach()), steps)


def _until_halted(
    model: Recurrent, x: Tensor, y: Tensor, z: Tensor, mask: Tensor | None, max_steps: int, halting: Halting
) -> HaltingResult:
    state: dict[str, Tensor] = {"x": x, "y": y, "z": z, "y_before": y, "z_before": z}
    state["logits"] = x.new_zeros(len(x))
    if mask is not None:
        state["mask"] = mask

    def step(
        x: Tensor, y: Tensor, z: Tensor, mask: Tensor | None = None, **_: Tensor
    ) -> tuple[Mapping[str, Tensor], Tensor]:
        new_y, new_z = model.deep_recursion(x, y, z, mask, with_gradients=False)
        logits = model.halt_logits(new_y)
        sure = torch.sigmoid(logits).mean().expand(len(logits)) > 0.5 if halting == "batch" else logits > 0
        return {"y": new_y, "z": new_z, "y_before": y, "z_before": z, "logits": logits}, sure

    return halting_recursion(step, state, max_steps, compact=halting == "sample")
