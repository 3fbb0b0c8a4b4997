"""Per-sample halting: finished samples leave the batch and cost nothing more."""

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
    """A device-side count that the host reads one push late, so that it never waits for work in flight.

    Each push returns the count of the previous push, on every device. On CUDA that copy has usually arrived;
    if not, the host waits for that copy only.
    """

    def __init__(self) -> None:
        self._reads = HostReads()

    def push(self, count: Tensor) -> int | None:
        """Enqueue ``count`` (one element) and return the previous count, or None on the first push."""
        self._reads.push(count)
        return int(self._reads.take()[1]) if len(self._reads) > 1 else None

    def last(self) -> int | None:
        """Wait for the last count and return it, or None if none is pending."""
        return int(self._reads.take()[1]) if len(self._reads) else None


@dataclass(frozen=True)
class HaltingResult:
    """Result of :func:`halting_recursion`.

    Attributes:
        state: State of each sample when it halted, [B, ...] in input order.
        exit_steps: Step at which each sample halted, counted from 1, int32 [B]; ``max_steps`` for samples
            that did not halt.
        halted: Whether each sample halted before the limit stopped it, bool [B].
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
    """Apply ``step`` until every sample has halted, but at most ``max_steps`` times; inference only.

    A sample's result is its state after the step at which it halted. Halted samples are removed from the
    batch whenever the remaining ones fit into a smaller bucket; results are in input order. The host reads
    the number of remaining samples one step late (:class:`AsyncCount`), so that it never stalls the device.
    As a result, one extra step may run when all samples have halted; its result is discarded.

    Exit steps and states equal those of ``compact=False`` bit for bit if ``step`` computes each sample
    independently of the others and of the batch size, as elementwise operations do. A matrix product may sum
    in another order for another batch size; the results then agree within rounding.

    Args:
        step: Called with the members of the state as keyword arguments, with batch size B or smaller.
            Returns the members that change, and which samples halt, bool [B]. Members that it omits (inputs,
            masks, ids) stay unchanged. To halt on the batch mean, return
            ``(logits.mean() > 0).expand(len(logits))``.
        state: Tensors [B, ...] by name, all on one device.
        max_steps: Maximum number of steps, at least 1.
        compact: Whether to remove halted samples from the batch.
        bucket: Rounds the number of remaining samples up to a batch size; halted samples fill the rest.

    Raises:
        ValueError: If batch sizes differ or ``max_steps`` is below 1.
    """
    arguments.integer("max_steps", max_steps, 1)
    sizes = {name: member.shape[0] for name, member in state.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"all members of the state must have the same batch size, got {sizes}")
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
        rows.update(updates, halt, number)
        left = count.push((~rows.done).sum())
        if left == 0:
            break
        if compact and left is not None and bucket(left) < rows.size:
            results.scatter(rows)
            rows = rows.gather(bucket(left))
    results.scatter(rows)
    return HaltingResult(results.state, results.exit_steps, results.done, tuple(calls))


class _Rows:
    """Samples in flight: their state, their indices in the input, and whether and when they halted."""

    def __init__(self, state: State, indices: Tensor) -> None:
        self.state = dict(state)
        self.indices = indices
        self.exit_steps = torch.zeros(indices.shape, dtype=torch.int32, device=indices.device)
        self.done = torch.zeros(indices.shape, dtype=torch.bool, device=indices.device)
        self.changed: dict[str, None] = {}

    @property
    def size(self) -> int:
        return self.indices.shape[0]

    def update(self, updates: State, halt: Tensor, number: int) -> None:
        """Store the result of a step for the samples that have not halted."""
        if halt.shape != self.done.shape:
            raise ValueError(
                f"expected one halting flag per sample, {list(self.done.shape)}, got {list(halt.shape)}"
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
        """Return the first ``size`` samples, with unfinished samples first and otherwise in order."""
        # argsort rather than nonzero, whose output size would have to be read from the device.
        kept = torch.argsort(self.done.to(torch.uint8), stable=True)[:size]
        smaller = _Rows({name: member[kept] for name, member in self.state.items()}, self.indices[kept])
        smaller.exit_steps, smaller.done = self.exit_steps[kept], self.done[kept]
        smaller.changed = dict(self.changed)
        return smaller

    def scatter(self, rows: _Rows) -> None:
        """Write ``rows`` to their indices in this full batch."""
        for name in rows.changed:
            if rows.state[name].dtype != self.state[name].dtype or name not in self.changed:
                # Copy on the first write, to leave the caller's tensor unchanged.
                self.state[name] = self.state[name].to(rows.state[name].dtype, copy=True)
                self.changed[name] = None
            self.state[name].index_copy_(0, rows.indices, rows.state[name])
        self.exit_steps.index_copy_(0, rows.indices, rows.exit_steps)
        self.done.index_copy_(0, rows.indices, rows.done)
