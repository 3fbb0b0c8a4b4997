"""Halting sample by sample: a recursion in which samples that are done cost nothing more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trm_kernels import arguments
from trm_kernels.graphs.buckets import Bucket, power_of_two
from trm_kernels.host_reads import HostReads

State = Mapping[str, Tensor]


class AsyncCount:
    """A count on the device, read one push late, so that the host never waits for the work in flight.

    The answer to a push is the count of the push before, on every device: on CUDA it has usually arrived
    long since, and if not, the host waits for that older copy alone.
    """

    def __init__(self) -> None:
        self._reads = HostReads()

    def push(self, count: Tensor) -> int | None:
        """Enqueue ``count`` (one element); returns the one pushed before, None the first time."""
        self._reads.push(count)
        return int(self._reads.take()[1]) if len(self._reads) > 1 else None

    def last(self) -> int | None:
        """The count pushed last, which is waited for; None if there is none left."""
        return int(self._reads.take()[1]) if len(self._reads) else None


@dataclass(frozen=True)
class HaltingResult:
    """What :func:`halting_recursion` returns.

    Attributes:
        state: The state at each sample's exit, [B, ...] in the order of the input.
        exit_steps: The step at which each sample halted, counted from 1, int32 [B]; ``max_steps`` for those
            that never did.
        halted: Samples that halted by themselves, bool [B].
        calls: Batch size of each call of the step function.
    """

    state: dict[str, Tensor]
    exit_steps: Tensor
    halted: Tensor
    calls: tuple[int, ...]


@torch.no_grad()
def halting_recursion(
    step: Callable[..., tuple[Mapping[str, Tensor], Tensor]],
    state: State,
    max_steps: int,
    *,
    compact: bool = True,
    bucket: Bucket = power_of_two,
) -> HaltingResult:
    """Apply ``step`` until every sample has halted, at most ``max_steps`` times; inference only.

    A sample's result is its state after the step at which it halted. Halted samples are taken out of the
    batch whenever the rest fit into a smaller bucket, and results return to the input's order. The host
    learns how many are left one step late (:class:`AsyncCount`), so that it never stalls the device: one
    step may run for samples that are all done, and its result is not used.

    Exit steps and states are those of ``compact=False``, bit for bit where ``step`` computes a sample's row
    independently of the others and of the batch size. Elementwise work does. A matrix product may choose
    another order of summation for another batch size, and then results agree within rounding.

    Args:
        step: Called with the state's members as keyword arguments, of batch size B or smaller; gives the
            members that change, and which samples halt, bool [B]. Members that it leaves out (inputs, masks,
            ids) stay. Halting on the mean of the batch is ``(logits.mean() > 0).expand(len(logits))``.
        state: Tensors [B, ...] by name, all on one device.
        max_steps: Steps at most, at least 1.
        compact: Whether to take halted samples out.
        bucket: How the number of samples left is rounded up to a batch size; halted samples fill the rest.

    Raises:
        ValueError: Batch sizes differ, or ``max_steps`` is below 1.
    """
    arguments.whole("max_steps", max_steps, 1)
    sizes = {name: member.shape[0] for name, member in state.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"members of the state need one batch size, got {sizes}")
    batch = next(iter(sizes.values()))
    device = next(iter(state.values())).device
    rows = _Rows(state, torch.arange(batch, device=device))
    if batch == 0:
        return HaltingResult(dict(state), rows.exit_steps, rows.done, ())
    results = _Rows(state, rows.indices)
    count, calls = AsyncCount(), []
    for number in range(1, max_steps + 1):
        calls.append(rows.size)
        updates, halt = step(**rows.state)
        rows.take(updates, halt, number)
        left = count.push((~rows.done).sum())
        if left == 0:
            break
        if compact and left is not None and bucket(left) < rows.size:
            results.scatter(rows)
            rows = rows.gather(bucket(left))
    results.scatter(rows)
    return HaltingResult(results.state, results.exit_steps, results.done, tuple(calls))


class _Rows:
    """Samples in flight: state, which of the input they are, and where they stand."""

    def __init__(self, state: State, indices: Tensor) -> None:
        self.state = dict(state)
        self.indices = indices
        self.exit_steps = torch.zeros(indices.shape, dtype=torch.int32, device=indices.device)
        self.done = torch.zeros(indices.shape, dtype=torch.bool, device=indices.device)
        self.changed: dict[str, None] = {}

    @property
    def size(self) -> int:
        return self.indices.shape[0]

    def take(self, updates: State, halt: Tensor, number: int) -> None:
        """Take over a step's result for the samples that are not done."""
        if halt.shape != self.done.shape:
            raise ValueError(
                f"expected one halting flag for each sample, {list(self.done.shape)}, got {list(halt.shape)}"
            )
        for name, new in updates.items():
            old = self.state[name]
            if new.shape != old.shape:
                raise ValueError(f"{name} changed its shape from {list(old.shape)} to {list(new.shape)}")
            done = self.done.view(-1, *(1,) * (old.dim() - 1))
            self.state[name] = torch.where(done, old, new)
            self.changed[name] = None
        self.exit_steps = torch.where(self.done, self.exit_steps, number)
        self.done = self.done | halt

    def gather(self, size: int) -> _Rows:
        """The ``size`` first samples when those that are not done come first, in their order."""
        # argsort of flags, not nonzero: its size would have to be read from the device.
        kept = torch.argsort(self.done.to(torch.uint8), stable=True)[:size]
        smaller = _Rows({name: member[kept] for name, member in self.state.items()}, self.indices[kept])
        smaller.exit_steps, smaller.done = self.exit_steps[kept], self.done[kept]
        smaller.changed = dict(self.changed)
        return smaller

    def scatter(self, rows: _Rows) -> None:
        """Write ``rows`` to their places in this full batch."""
        for name in rows.changed:
            if rows.state[name].dtype != self.state[name].dtype or name not in self.changed:
                # The first time: the caller's own tensor stays as it is.
                self.state[name] = self.state[name].to(rows.state[name].dtype, copy=True)
                self.changed[name] = None
            self.state[name].index_copy_(0, rows.indices, rows.state[name])
        self.exit_steps.index_copy_(0, rows.indices, rows.exit_steps)
        self.done.index_copy_(0, rows.indices, rows.done)
