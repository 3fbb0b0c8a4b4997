"""A training step of a Tiny Recursive Model, captured as one CUDA graph where there is a GPU."""

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

#: ``loss(y, z, *batch)`` gives the loss and metrics, and, if it decides on halting, flags [B] too.
Loss = Callable[..., "tuple[Tensor, Mapping[str, Tensor]] | tuple[Tensor, Mapping[str, Tensor], Tensor]"]
Initial = Callable[[Tensor], "tuple[Tensor, Tensor]"]
#: Changes gradients in place, for instance to their mean over several processes.
Reduce = Callable[[Sequence[Tensor]], None]

#: Batch shapes whose static buffers and carry are kept, and kinds of call whose plain runs are counted.
_MAX_SHAPES = 16
_MAX_KEYS = 256


@dataclass(eq=False)
class _Program:
    """What one shape of batch runs on: the batch in static tensors, and the samples in flight."""

    fresh: tuple[Tensor | None, ...]
    carry: Carry

    def load(self, batch: tuple[Tensor | None, ...]) -> None:
        """Copy ``batch`` into the static tensors."""
        for own, tensor in zip(self.fresh, batch, strict=True):
            if own is not None and tensor is not None:
                own.copy_(tensor.detach(), non_blocking=True)


class TrainingStep:
    """One supervision step: T - 1 recursions without gradient, one with, loss, backward, clip, update, EMA.

    On a CUDA device the first ``warmup`` calls run as they are, on a side stream; then the step is captured
    and replayed, for each shape of batch. Elsewhere the same code simply runs. Nothing on the way waits for
    the device: metrics are read by :meth:`poll`, learning rates are device tensors, and a non-finite
    gradient skips its update by a device flag. Where no graph is to be had, :meth:`GraphCache.status` counts
    the calls by reason, and each reason is warned of once.

    The step keeps the samples in flight in a :class:`~trm_kernels.carry.Carry`. Each call refills the slots
    whose sample has halted from the batch that it is given, and advances all slots by
    ``supervision_steps`` recursions; which have halted is decided after the last. To train on one batch for
    N supervision steps, call :meth:`restart` and then N times with that batch.

    Hooks of the optimizer, of modules or of gradients are Python, which a replay does not run: a step with
    such hooks is not captured. Global optimizer post-hooks are called after each replay. Gradients are not
    kept after a step.

    Args:
        net: The network that recursions apply.
        loss: Called as ``loss(y, z, *batch)`` on the samples in flight. Gives a loss (one element), metrics
            (tensors of one element by name), and optionally bool flags [B] of samples that are done.
        optimizer: To be captured, it needs ``capturable=True`` and learning rates that are tensors on the
            device; :func:`capturable_adamw` builds such a one.
        n, T, output_norm: As for :func:`~trm_kernels.deep_recursion`.
        embed: Gives x [B, L, D] of a batch, called as ``embed(*batch)``, with gradient; by default the first
            tensor of the batch is x.
        mask: Gives the mask [B, L] of a batch, or a :class:`~trm_kernels.Packing` of it, called as
            ``mask(*batch)``; by default there is none.
        initial: Gives the states (y, z), broadcastable to x, that a sample starts from, called as
            ``initial(x)``; zeros by default. With T = 1 they get gradients, of zeros (and not None) on a step
            that no sample starts on.
        clip_norm: Largest gradient norm; None for no clipping.
        reduce: Called with all gradients before each update, before they are clipped. A step with it is not
            captured.
        average: Updated after each step.
        autocast_dtype: ``torch.bfloat16`` to run under autocast.
        supervision_steps: Recursions, each with a loss of its own, in one update; gradients are averaged.
        max_steps: Supervision steps after which a sample halts in any case.
        exploration: Probability with which a sample must go on for a random number of steps.
        skip_nonfinite: Skip the update when the gradient is not finite, and restart samples whose states are
            not. Needs an optimizer with ``fused=True``.
        read_every: Steps between two reads of the metrics.
        modules: Modules that ``loss``, ``embed`` and ``initial`` read, where these are plain functions.
        capture: Whether to use graphs.
        warmup: Calls that run plainly before a capture, at least 1.
        cache: Where graphs are kept.
        **options: Further options of :func:`~trm_kernels.deep_recursion`.

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
            raise ValueError("float16 needs its loss scaled, which this step does not do: use bfloat16")
        arguments.whole("n", n, 0)
        arguments.whole("T", T, 1)
        arguments.whole("supervision_steps", supervision_steps, 1)
        # The optimizer sets itself up in its first step.
        arguments.whole("warmup", warmup, 1)
        if max_steps is not None:
            arguments.whole("max_steps", max_steps, 1)
        if clip_norm is not None:
            arguments.real("clip_norm", clip_norm, positive=True)
        if isinstance(exploration, bool) or not 0.0 <= exploration <= 1.0:
            raise ValueError(f"exploration must lie in [0, 1], not {exploration}")
        if exploration > 0.0 and max_steps is None:
            raise ValueError("exploration draws from 2 .. max_steps: give max_steps")
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
        self._token = object()  # in the keys of a cache that may outlive this step
        self._optimizer_state, self._generation = optimizer.state, 0
        if capture:
            # torch warns of capturable=True in a step that is not captured; those that warm up are meant.
            optimizer._warned_capturable_if_run_uncaptured = True
        self._programs: OrderedDict[Hashable, _Program] = OrderedDict()
        self._plain_runs: OrderedDict[Hashable, int] = OrderedDict()

    def __call__(self, *batch: Tensor | None) -> None:
        """Take one step; ``batch``: tensors [B, ...] on any device, of which halted slots take their rows."""
        with self.cache.lock, torch.enable_grad():
            self._step(self._program(batch), batch)
        self.metrics.count_step()

    def prepare(self, *batch: Tensor | None) -> Carry:
        """The carry for batches of this shape, without a step: a resumed run restores it."""
        return self._program(batch).carry

    def restart(self) -> None:
        """Let every slot take a new sample at its next step."""
        for program in self._programs.values():
            program.carry.restart()

    def poll(self) -> list[MetricWindow]:
        """Means of the metrics over windows of ``read_every`` steps that are new here; never waits.

        Besides those of ``loss``: ``loss`` itself, ``halted`` (share of the samples), with clipping
        ``grad_norm`` (before it), with ``skip_nonfinite`` ``skipped`` (share of the updates).
        """
        return self.metrics.poll()

    def drain(self) -> list[MetricWindow]:
        """The windows that are left, the last one unfinished perhaps; waits for the device."""
        return self.metrics.drain()

    @property
    def carry(self) -> Carry:
        """The samples in flight of the batch shape that was used last."""
        return next(reversed(self._programs.values())).carry

    def _program(self, batch: tuple[Tensor | None, ...]) -> _Program:
        """The program for this shape of batch."""
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
            # load_state_dict: the moments lie elsewhere from now on.
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
        """Replay the step, captured first if need be, or run it if it must warm up before that."""
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
            # The graph keeps the program, whose id is in the key.
            entry = self.cache.capture(key, lambda: self._run(program), device, payload=program)
        self.cache.replay(entry)
        capturable.call_global_post_hooks(self.optimizer)

    def _warms_up(self, key: Hashable) -> bool:
        """Whether this kind of call has run plainly too few times; counts one more if so."""
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
        # Besides what uncached_autocast says: a cast cached in the recursions without gradient has none.
        return torch.autocast(device.type, self._autocast_dtype, cache_enabled=False)

    def _run(self, program: _Program) -> None:
        """The step itself: device work alone, in place wherever it must outlive the step."""
        carry = program.carry
        self._clear_gradients()
        carry.refill(program.fresh)
        metrics: dict[str, Tensor] = {}
        for number in range(self._supervision_steps):
            for name, value in self._supervise(carry, first=number == 0).items():
                share = value.detach() / self._supervision_steps if self._supervision_steps > 1 else value
                metrics[name] = metrics[name] + share if name in metrics else share
        metrics.update(self._update())
        self.metrics.add(metrics)
        self._clear_gradients()

    def _supervise(self, carry: Carry, *, first: bool) -> dict[str, Tensor]:
        """One deep recursion and its backward pass; the samples in flight advance."""
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
                raise CaptureError("a graph would keep a batch's lengths: give a Packing without them")
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
        """Reduce, clip, step and average; gives what it measured."""
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
                # The flag that a gradient scaler hands to fused optimizers: they return at once if it is set.
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
        # None, not zeros: the backward writes gradients where it likes, in a graph always to the same place.
        for parameter in capturable.parameters_of(self.optimizer):
            parameter.grad = None
