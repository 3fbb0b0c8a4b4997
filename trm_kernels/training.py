"""A training step of a Tiny Recursive Model, captured as one CUDA graph on GPUs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trm_kernels import arguments
from trm_kernels.carry import Carry, exploration_steps
from trm_kernels.graphs.cache import GraphCache, is_nested
from trm_kernels.graphs.capture import CaptureError
from trm_kernels.graphs.function import uncached_autocast
from trm_kernels.graphs.keys import ModuleWatch, ambient
from trm_kernels.metrics import MetricBuffer, MetricWindow
from trm_kernels.optim import capturable
from trm_kernels.optim.averaging import ParameterAverage
from trm_kernels.packing import Packing
from trm_kernels.recursion import Network, deep_recursion

#: ``loss(y, z, *batch)`` returns the loss, the metrics and, optionally, halting flags [B].
Loss = Callable[..., "tuple[Tensor, Mapping[str, Tensor]] | tuple[Tensor, Mapping[str, Tensor], Tensor]"]
Initial = Callable[[Tensor], "tuple[Tensor, Tensor]"]
#: Changes gradients in place, for example to their mean over several processes.
Reduce = Callable[[Sequence[Tensor]], None]

#: Maximum number of batch shapes whose static buffers and carry are kept, and of graph keys whose warm-up
#: runs are counted.
_MAX_SHAPES = 16
_MAX_KEYS = 256


@dataclass(eq=False)
class _Program:
    """State of one batch shape: the batch in static tensors, and the samples in flight."""

    fresh: tuple[Tensor | None, ...]
    carry: Carry

    def load(self, batch: tuple[Tensor | None, ...]) -> None:
        """Copy ``batch`` into the static tensors."""
        for own, tensor in zip(self.fresh, batch, strict=True):
            if own is not None and tensor is not None:
                own.copy_(tensor.detach(), non_blocking=True)


class TrainingStep:
    """One supervision step: T - 1 recursions without gradient, one with, loss, backward, clip, update, EMA.

    On a CUDA device the first ``warmup`` calls run eagerly on a side stream. After that, the step is captured
    and replayed, once per batch shape. On other devices the same code runs eagerly. The step never waits for
    the device: :meth:`poll` reads metrics asynchronously, learning rates are device tensors, and a device
    flag skips the update if a gradient is not finite. If a call cannot use a graph,
    :meth:`GraphCache.status` counts it under its reason, and each reason triggers one warning.

    A :class:`~trm_kernels.carry.Carry` holds the samples in flight. Each call refills the slots of halted
    samples from its batch, advances all slots by ``supervision_steps`` recursions, and then determines which
    samples have halted. To train on one batch for N supervision steps, call :meth:`restart`, then call the
    step N times with that batch.

    A replay does not run Python, so a step with optimizer, module or gradient hooks is not captured. Global
    optimizer post-hooks are called after each replay. Gradients are cleared after each step.

    Args:
        net: The network that the recursions apply.
        loss: Called as ``loss(y, z, *batch)`` on the samples in flight. Returns a loss (one element), metrics
            (one-element tensors by name) and, optionally, bool flags [B] of samples that halt.
        optimizer: A capture requires ``capturable=True`` and learning rates that are tensors on the device;
            :func:`capturable_adamw` builds such an optimizer.
        n, T, output_norm: See :func:`~trm_kernels.deep_recursion`.
        embed: Called as ``embed(*batch)``, with gradients; returns x [B, L, D]. By default, x is the first
            tensor of the batch.
        mask: Called as ``mask(*batch)``; returns the mask [B, L] or a :class:`~trm_kernels.Packing` of it. By
            default, there is no mask.
        initial: Called as ``initial(x)``; returns the initial states (y, z) of a sample, broadcastable to x.
            Zeros by default. With T = 1 they receive gradients, which are zeros rather than None in a step
            that starts no sample.
        clip_norm: Maximum gradient norm; None disables clipping.
        reduce: Called with all gradients before clipping and each update. A step with it is not captured.
        average: Updated after each step.
        autocast_dtype: ``torch.bfloat16`` to run under autocast.
        supervision_steps: Recursions per update, each with its own loss. Their gradients are averaged.
        max_steps: Supervision steps after which a sample halts in any case.
        exploration: Probability that a sample must continue for a random number of steps.
        skip_nonfinite: Skip the update if the gradient is not finite, and restart samples whose states are
            not finite. Requires an optimizer with ``fused=True``.
        read_every: Steps between two reads of the metrics.
        modules: Modules that ``loss``, ``embed`` and ``initial`` read, if these are plain functions.
        capture: Whether to use graphs.
        warmup: Eager calls before a capture, at least 1.
        cache: Stores the graphs.
        **options: Other options of :func:`~trm_kernels.deep_recursion`.

    Example:
        >>> optimizer = capturable_adamw(model.parameters(), lr=1e-4)
        >>> step = TrainingStep(model.net, loss, optimizer, n=6, T=3, embed=model.embed, modules=[model])
        >>> for tokens, labels in batches:
        ...     step(tokens, labels)
        ...     for window in step.poll():
        ...         print(window.step, window.values["loss"])
    """

    def __init__(
        self,
        net: Network,
        loss: Loss,
        optimizer: Optimizer,
        *,
        n: int,
        T: int,
        output_norm: Callable[[Tensor], Tensor] | None = None,
        embed: Callable[..., Tensor] | None = None,
        mask: Callable[..., Tensor | Packing] | None = None,
        initial: Initial | None = None,
        clip_norm: float | None = None,
        reduce: Reduce | None = None,
        average: ParameterAverage | None = None,
        autocast_dtype: torch.dtype | None = None,
        supervision_steps: int = 1,
        max_steps: int | None = None,
        exploration: float = 0.0,
        skip_nonfinite: bool = False,
        read_every: int = 10,
        modules: Iterable[nn.Module] = (),
        capture: bool = True,
        warmup: int = 3,
        cache: GraphCache | None = None,
        **options: Any,
    ) -> None:
        if autocast_dtype == torch.float16:
            raise ValueError("float16 needs loss scaling, which this step does not support: use bfloat16")
        arguments.integer("n", n, 0)
        arguments.integer("T", T, 1)
        arguments.integer("supervision_steps", supervision_steps, 1)
        # The optimizer creates its state in its first step.
        arguments.integer("warmup", warmup, 1)
        if max_steps is not None:
            arguments.integer("max_steps", max_steps, 1)
        if clip_norm is not None:
            arguments.real("clip_norm", clip_norm, positive=True)
        if isinstance(exploration, bool) or not 0.0 <= exploration <= 1.0:
            raise ValueError(f"exploration must be in [0, 1], not {exploration}")
        if exploration > 0.0 and max_steps is None:
            raise ValueError("exploration draws from 2 .. max_steps: set max_steps")
        if skip_nonfinite and not all(group.get("fused") for group in optimizer.param_groups):
            raise ValueError("skip_nonfinite needs an optimizer with fused=True, which reads a device flag")
        self.optimizer = optimizer
        self.average = average
        self.cache = GraphCache() if cache is None else cache
        self.metrics = MetricBuffer(read_every)
        self.clip_norm = clip_norm
        self._reduce = reduce
        self._net, self._loss, self._embed, self._mask, self._initial = net, loss, embed, mask, initial
        self._n, self._T, self._output_norm, self._options = n, T, output_norm, options
        self._autocast_dtype = autocast_dtype
        self._supervision_steps, self._max_steps = supervision_steps, max_steps
        self._exploration, self._skip_nonfinite = exploration, skip_nonfinite
        self._capture, self._warmup = capture, warmup
        read = (net, loss, embed, mask, initial, output_norm)
        self._watch = ModuleWatch([*(module for module in read if isinstance(module, nn.Module)), *modules])
        self._token = object()  # part of the keys of a cache that may outlive this step
        self._optimizer_state, self._generation = optimizer.state, 0
        if capture:
            # torch warns if a capturable=True optimizer steps uncaptured, but the warm-up does so on purpose.
            optimizer._warned_capturable_if_run_uncaptured = True
        self._programs: OrderedDict[Hashable, _Program] = OrderedDict()
        self._plain_runs: OrderedDict[Hashable, int] = OrderedDict()

    def __call__(self, *batch: Tensor | None) -> None:
        """Run one step. Halted slots are refilled from ``batch``: tensors [B, ...] on any device, or None."""
        with self.cache.lock, torch.enable_grad():
            self._step(self._program(batch), batch)
        self.metrics.count_step()

    def prepare(self, *batch: Tensor | None) -> Carry:
        """Return the carry for batches of this shape without running a step, so a resumed run can load it."""
        return self._program(batch).carry

    def restart(self) -> None:
        """Refill every slot at its next step."""
        for program in self._programs.values():
            program.carry.restart()

    def poll(self) -> list[MetricWindow]:
        """Return metric means over new windows of ``read_every`` steps; never waits for the device.

        In addition to the metrics of ``loss``: ``loss`` itself, ``halted`` (fraction of samples),
        ``grad_norm`` (before clipping, with ``clip_norm`` or ``skip_nonfinite``) and ``skipped`` (fraction
        of updates, with ``skip_nonfinite``).
        """
        return self.metrics.poll()

    def drain(self) -> list[MetricWindow]:
        """Return the remaining windows, including an incomplete last one; waits for the device."""
        return self.metrics.drain()

    @property
    def carry(self) -> Carry:
        """The samples in flight for the most recently used batch shape."""
        return next(reversed(self._programs.values())).carry

    def _program(self, batch: tuple[Tensor | None, ...]) -> _Program:
        """Return the program for this batch shape."""
        shapes = tuple(None if tensor is None else (tensor.shape, tensor.dtype) for tensor in batch)
        program = self._programs.get(shapes)
        if program is None:
            device = capturable.parameters_of(self.optimizer)[0].device
            fresh = tuple(
                None if tensor is None else torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                for tensor in batch
            )
            program = self._programs[shapes] = _Program(fresh, Carry(fresh))
            while len(self._programs) > _MAX_SHAPES:
                self._programs.popitem(last=False)
        self._programs.move_to_end(shapes)
        return program

    def _step(self, program: _Program, batch: tuple[Tensor | None, ...]) -> None:
        capturer = self.cache.capturer
        if not self._capture or is_nested() or capturer.capturing():
            program.load(batch)
            self._run(program)
            return
        device = program.carry.halted.device
        reason = self._refusal(device)
        if reason is None:
            # A replay on another stream may still read the batch before this one.
            capturer.order(device)
        program.load(batch)
        if reason is None:
            try:
                self._replay(program, device)
                return
            except CaptureError as error:
                reason = str(error)
                self._clear_gradients()
        self.cache.fall_back(reason)
        self._run(program)

    def _refusal(self, device: torch.device) -> str | None:
        return (
            self.cache.capturer.unavailable(device)
            or capturable.refusal(self.optimizer)
            or self._watch.hooks()
            or self._watch.communicates()
            or ("a replay would not call the function that reduces gradients" if self._reduce else None)
        )

    def _key(self, program: _Program, device: torch.device) -> Hashable:
        if self.optimizer.state is not self._optimizer_state:
            # After load_state_dict the moments are in other memory.
            self._optimizer_state = self.optimizer.state
            self._generation += 1
        return (
            self._token,
            id(program),
            self._generation,
            ambient(device),
            self._watch.key(),
            capturable.settings(self.optimizer),
            self.clip_norm,
            None if self.average is None else self.average.decay,
        )

    def _replay(self, program: _Program, device: torch.device) -> None:
        """Replay the step, capturing it first if needed, or run it eagerly while it warms up."""
        key = self._key(program, device)
        entry = self.cache.get(key)
        if entry is None:
            reason = self.cache.refused(key)
            if reason is not None:
                raise CaptureError(reason)
            if self._warms_up(key):
                self.cache.fall_back("warming up for a capture", warn=False)
                self.cache.capturer.aside(lambda: self._run(program), device)
                return
            # The payload keeps the program alive, because its id is in the key.
            entry = self.cache.capture(key, lambda: self._run(program), device, payload=program)
        self.cache.replay(entry)
        capturable.call_global_post_hooks(self.optimizer)

    def _warms_up(self, key: Hashable) -> bool:
        """Whether this kind of call needs another warm-up run; counts that run if so."""
        runs = self._plain_runs.get(key, 0)
        if runs == self._warmup:
            return False
        self._plain_runs[key] = runs + 1
        while len(self._plain_runs) > _MAX_KEYS:
            self._plain_runs.popitem(last=False)
        return True

    def _autocast(self, device: torch.device) -> AbstractContextManager[None]:
        if self._autocast_dtype is None:
            return uncached_autocast(device)
        # A second reason, apart from that in uncached_autocast: a cast that is cached under no_grad has no
        # gradient.
        return torch.autocast(device.type, self._autocast_dtype, cache_enabled=False)

    def _run(self, program: _Program) -> None:
        """Run the step: only device work, and in place for everything that outlives the step."""
        carry = program.carry
        self._clear_gradients()
        carry.refill(program.fresh)
        metrics: dict[str, Tensor] = {}
        for number in range(self._supervision_steps):
            for name, value in self._supervise(carry, first=number == 0).items():
                part = value.detach() / self._supervision_steps if self._supervision_steps > 1 else value
                metrics[name] = metrics[name] + part if name in metrics else part
        metrics.update(self._update())
        self.metrics.add(metrics)
        self._clear_gradients()

    def _supervise(self, carry: Carry, *, first: bool) -> dict[str, Tensor]:
        """Run one deep recursion and its backward pass, and advance the samples in flight."""
        with self._autocast(carry.halted.device):
            data = carry.data
            x = data[0] if self._embed is None else self._embed(*data)
            assert x is not None
            if first or carry.y is None or carry.z is None:
                y, z = (torch.zeros_like(x),) * 2 if self._initial is None else self._initial(x)
                y, z = carry.states(y.expand_as(x), z.expand_as(x))
            else:
                y, z = carry.y, carry.z
            mask = None if self._mask is None else self._mask(*data)
            if isinstance(mask, Packing) and mask.lengths is not None and self.cache.capturer.capturing():
                raise CaptureError(
                    "a graph would fix the lengths of one batch: use a Packing without lengths"
                )
            y, z = deep_recursion(
                self._net,
                x,
                y,
                z,
                self._n,
                self._T,
                mask=mask,
                output_norm=self._output_norm,
                **self._options,
            )
            loss, metrics, *halt = self._loss(y, z, *data)
        (loss / self._supervision_steps if self._supervision_steps > 1 else loss).backward()
        lower = None
        if self._exploration > 0.0 and self._max_steps is not None:
            lower = exploration_steps(carry.steps, self._max_steps, self._exploration)
        carry.advance(y, z, halt[0] if halt else None, max_steps=self._max_steps, min_steps=lower)
        if self._skip_nonfinite:
            carry.restart_nonfinite()
        return {"loss": loss, **metrics, "halted": carry.halted.float().mean()}

    @torch.no_grad()
    def _update(self) -> dict[str, Tensor]:
        """Reduce and clip gradients, step the optimizer and update the average; returns metrics."""
        measured: dict[str, Tensor] = {}
        parameters = [p for p in capturable.parameters_of(self.optimizer) if p.grad is not None]
        if self._reduce is not None:
            self._reduce([p.grad for p in parameters if p.grad is not None])
        if self.clip_norm is not None or self._skip_nonfinite:
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            measured["grad_norm"] = norm
            if self.clip_norm is not None:
                nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, norm)
            if self._skip_nonfinite:
                # A gradient scaler passes this flag to fused optimizers, which skip the step if it is set.
                measured["skipped"] = (~norm.isfinite()).float()
                self.optimizer.found_inf = measured["skipped"]  # type: ignore[attr-defined]
        try:
            self.optimizer.step()
        finally:
            if self._skip_nonfinite:
                del self.optimizer.found_inf  # type: ignore[attr-defined]
        if self.average is not None:
            self.average.update()
        return measured

    def _clear_gradients(self) -> None:
        # None, not zeros: the backward then allocates gradients freely, and a graph always at the same
        # address.
        for parameter in capturable.parameters_of(self.optimizer):
            parameter.grad = None
