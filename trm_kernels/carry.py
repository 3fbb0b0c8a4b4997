"""The state of samples in flight, kept on the device (``carry`` of the code of arXiv 2510.04871)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Carry:
    """One slot for each sample of a batch; a slot whose sample has halted takes a new one at the next step.

    All updates are in place and decided by device tensors: nothing waits for the device, and a CUDA graph can
    hold them. A carry begins with every slot halted.

    Attributes:
        y, z: Detached states [B, L, D]; None before the first step.
        data: What the slots' samples are (inputs, labels, mask, ...), each [B, ...] or None.
        steps: Supervision steps that each sample has had, int32 [B].
        halted: Slots that the next step refills, bool [B].

    Args:
        data: Tensors [B, ...] that give shapes, dtypes and device; copied.
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
        """Put samples of ``fresh`` [B, ...] into the halted slots, row for row, and reset their counters."""
        for own, new in zip(self.data, fresh, strict=True):
            if (own is None) != (new is None):
                raise ValueError("fresh data must have a tensor wherever the carry has one")
            if own is not None and new is not None:
                own.copy_(torch.where(_rows(self.halted, own), new, own))
        self.steps.masked_fill_(self.halted, 0)

    def states(self, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """States to start the step from: ``y, z`` [B, L, D] in halted slots, the carried ones elsewhere.

        Gradients reach the initial states of halted slots.
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
        """Store what a step made of the states, count it, and decide which samples are done.

        Args:
            y, z: New states [B, L, D].
            halt: Samples that are done by their own account, bool [B].
            max_steps: Samples with so many steps are done in any case.
            min_steps: Samples with fewer steps [B] go on even so, unless ``max_steps`` ends them: the
                exploration of the paper draws it at random (:func:`exploration_steps`).
        """
        if self.y is None or self.z is None:
            # Under autocast the states have another dtype than what they started from.
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
        """Let the next step refill the slots whose states hold infinities or NaN."""
        for state in (self.y, self.z):
            if state is not None:
                self.halted.logical_or_(~state.isfinite().flatten(1).all(dim=1))

    def restart(self) -> None:
        """Let the next step refill every slot."""
        self.halted.fill_(True)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, by name; not copies."""
        tensors = {"steps": self.steps, "halted": self.halted, "y": self.y, "z": self.z}
        tensors |= {f"data.{number}": tensor for number, tensor in enumerate(self.data)}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` gave, in place where there is a tensor already.

        Raises:
            KeyError, RuntimeError: It is of a carry of other data.
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
    """Steps that each sample [B] must take at least: 0, or with ``probability`` one of 2 .. ``max_steps``."""
    explores = torch.rand(like.shape, device=like.device) < probability
    return explores * torch.randint(2, max(max_steps, 2) + 1, like.shape, device=like.device)


def _rows(flags: Tensor, like: Tensor) -> Tensor:
    """``flags`` [B] in a shape that broadcasts against ``like`` [B, ...]."""
    return flags.view(-1, *(1,) * (like.dim() - 1))
