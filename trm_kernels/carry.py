"""State of the samples in flight, kept on the device (the ``carry`` in the code of arXiv 2510.04871)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Carry:
    """One slot per sample of a batch. When a sample has halted, the next step refills its slot.

    All updates are in place and controlled by device tensors, so nothing waits for the device and a CUDA
    graph can capture them. Every slot of a new carry is halted.

    Attributes:
        y, z: Detached states [B, L, D]; None before the first step.
        data: The samples in the slots (inputs, labels, mask, ...), each [B, ...] or None.
        steps: Number of supervision steps of each sample, int32 [B].
        halted: Slots that the next step refills, bool [B].

    Args:
        data: Tensors [B, ...] that define shapes, dtypes and device. They are copied.
    """

    def __init__(self, data: Sequence[Tensor | None]) -> None:
        given = [tensor for tensor in data if tensor is not None]
        if not given:
            raise ValueError("a carry needs at least one tensor of data")
        batch = given[0].shape[0]
        if any(tensor.shape[0] != batch for tensor in given):
            raise ValueError(f"batch sizes differ: {[tensor.shape[0] for tensor in given]}")
        device = given[0].device
        self.data = tuple(None if tensor is None else tensor.detach().clone() for tensor in data)
        self.steps = torch.zeros(batch, dtype=torch.int32, device=device)
        self.halted = torch.ones(batch, dtype=torch.bool, device=device)
        self.y: Tensor | None = None
        self.z: Tensor | None = None

    @torch.no_grad()
    def refill(self, fresh: Sequence[Tensor | None]) -> None:
        """Copy rows of ``fresh`` [B, ...] into halted slots of the same index; reset their step counts."""
        for own, new in zip(self.data, fresh, strict=True):
            if (own is None) != (new is None):
                raise ValueError("fresh data must have a tensor wherever the carry has one")
            if own is not None and new is not None:
                own.copy_(torch.where(_rows(self.halted, own), new, own))
        self.steps.masked_fill_(self.halted, 0)

    def states(self, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the step's initial states: ``y, z`` [B, L, D] in halted slots, the carried states elsewhere.

        Gradients flow to the initial states of halted slots.
        """
        if self.y is None or self.z is None:
            return y, z
        halted = _rows(self.halted, y)
        return torch.where(halted, y, self.y), torch.where(halted, z, self.z)

    @torch.no_grad()
    def advance(
        self,
        y: Tensor,
        z: Tensor,
        halt: Tensor | None = None,
        *,
        max_steps: int | None = None,
        min_steps: Tensor | None = None,
    ) -> None:
        """Store the states after a step, count the step, and determine which samples have halted.

        Args:
            y, z: New states [B, L, D].
            halt: Samples that the loss halts, bool [B].
            max_steps: Samples with this many steps halt in any case.
            min_steps: Samples with fewer steps than this [B] continue, unless they reach ``max_steps``. The
                paper's exploration draws it at random (:func:`exploration_steps`).
        """
        if self.y is None or self.z is None:
            # Under autocast the dtype of the states may differ from that of the initial states.
            self.y, self.z = y.detach().clone(), z.detach().clone()
        else:
            self.y.copy_(y)
            self.z.copy_(z)
        self.steps.add_(1)
        done = torch.zeros_like(self.halted) if halt is None else halt.detach()
        if min_steps is not None:
            done = done & (self.steps >= min_steps)
        if max_steps is not None:
            done = done | (self.steps >= max_steps)
        self.halted.copy_(done)

    @torch.no_grad()
    def restart_nonfinite(self) -> None:
        """Mark slots whose states contain infinities or NaN, so that the next step refills them."""
        for state in (self.y, self.z):
            if state is not None:
                self.halted.logical_or_(~state.isfinite().flatten(1).all(dim=1))

    def restart(self) -> None:
        """Mark every slot, so that the next step refills it."""
        self.halted.fill_(True)

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that the next step depends on, by name. The tensors are not copies."""
        tensors = {"steps": self.steps, "halted": self.halted, "y": self.y, "z": self.z}
        tensors |= {f"data.{number}": tensor for number, tensor in enumerate(self.data)}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the result of :meth:`state_dict`, in place where a tensor already exists.

        Raises:
            KeyError, RuntimeError: If the state belongs to a carry of other data.
        """
        for name, own in self.state_dict().items():
            if name not in ("y", "z"):
                own.copy_(state[name])
        for name in ("y", "z"):
            value, own = state.get(name), getattr(self, name)
            if own is not None and value is not None:
                own.copy_(value)
            else:
                setattr(self, name, None if value is None else value.to(self.halted.device, copy=True))


def exploration_steps(like: Tensor, max_steps: int, probability: float) -> Tensor:
    """Draw the minimum number of steps of each sample [B]: 0, or with ``probability`` 2 .. ``max_steps``."""
    explores = torch.rand(like.shape, device=like.device) < probability
    return explores * torch.randint(2, max(max_steps, 2) + 1, like.shape, device=like.device)


def _rows(flags: Tensor, like: Tensor) -> Tensor:
    """Reshape ``flags`` [B] to broadcast against ``like`` [B, ...]."""
    return flags.view(-1, *(1,) * (like.dim() - 1))
