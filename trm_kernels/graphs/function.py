"""A function of tensors that replays as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trm_kernels import arguments, prepared
from trm_kernels.graphs.buckets import Bucket
from trm_kernels.graphs.cache import Entry, GraphCache, is_nested
from trm_kernels.graphs.capture import CaptureError
from trm_kernels.graphs.keys import ModuleWatch, ambient
from trm_kernels.streams import Shared

#: Pool memory that a function's own cache may hold.
DEFAULT_MAX_BYTES = 8 << 30

Arguments = tuple[Tensor | None, ...]
Shape = tuple[int, ...]


@dataclass
class _Buffers:
    """The static inputs of one graph; a replay reads what :meth:`load` wrote."""

    tensors: tuple[Tensor | None, ...]
    loaded: list[Shape]
    shared: Shared
    #: What the graph reads of frozen networks, which may be thawed while a replay is under way.
    frozen: list[Tensor] = field(default_factory=list)

    @classmethod
    def allocate(cls, arguments: Arguments, shapes: Sequence[Shape]) -> _Buffers:
        # Tensors made in inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            tensors = tuple(
                None if argument is None else torch.zeros(shape, dtype=argument.dtype, device=argument.device)
                for argument, shape in zip(arguments, shapes, strict=True)
            )
        return cls(tensors, [shape for shape in shapes], Shared([t for t in tensors if t is not None]))

    def load(self, arguments: Arguments) -> None:
        """Copy ``arguments`` in, zeros around them."""
        self.shared.read()  # the function may be dropped while this stream's replay is still under way
        targets, sources = [], []
        for index, (buffer, argument) in enumerate(zip(self.tensors, arguments, strict=True)):
            if buffer is None or argument is None:
                continue
            shape = argument.shape
            if shape != self.loaded[index]:
                if any(old > new for old, new in zip(self.loaded[index], shape, strict=True)):
                    buffer.zero_()  # a larger argument lay here before
                self.loaded[index] = shape
            targets.append(buffer if shape == buffer.shape else _corner(buffer, shape))
            sources.append(argument)
        torch._foreach_copy_(targets, sources)


def _corner(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The part of ``tensor`` that has ``shape`` and begins where it does."""
    for axis, size in enumerate(shape):
        if tensor.shape[axis] != size:
            tensor = tensor.narrow(axis, 0, size)
    return tensor


class GraphedFunction:
    """Captures ``function`` as a CUDA graph for each kind of call, and replays it.

    A call ``graphed(*tensors, **static)`` copies the tensors into static buffers, replays, and returns copies
    of the outputs. One graph serves all calls that agree in (bucketed) shapes, dtypes, device, static
    arguments, grad and inference mode, autocast, float32 matmul precision, backend, and in the storage of the
    watched modules' parameters: new values in place are seen by the next replay, new storage is captured
    anew. Dropout draws fresh numbers on every replay.

    What cannot be captured runs as a plain call: :meth:`GraphCache.status` counts the reasons, and each is
    warned of once. A call inside another capture, or inside ``torch.compile``, simply runs.

    Args:
        function: Called as ``function(*tensors, **static)``; returns a tensor or a tuple of tensors and
            None. It must not write to its arguments, nor read tensors on the host, and must compute the same
            launches for the same kind of call. Tensors that it reads besides its arguments and ``modules``
            are read where they lay when it was captured.
        modules: The modules that it reads; ``function`` itself, if it is one, needs no mention.
        axes: For bucketing, one string for each tensor argument, naming its leading axes: ``"BL"``. An
            argument that may be None keeps its place.
        out_axes: The same for the outputs.
        buckets: How the size of a named axis is rounded up; axes without a bucket stay exact. Arguments are
            padded with zeros at the end, and outputs cropped: what padding does to the rest is for the
            function to prevent, by a mask for instance.
        masks: Which arguments are masks, and of which axis: ``{3: "L"}``. Where a call that needs padding
            along that axis gives None for the mask, the graph gets ones, padded with zeros.
        clone: Whether outputs are copies. Without, they are views of the graph's memory, valid until the next
            call of any function that shares the cache.
        cache: Where graphs are kept; several functions may share one.
        warmup: Runs before a capture.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        modules: Iterable[nn.Module] = (),
        axes: Sequence[str] = (),
        out_axes: Sequence[str] = (),
        buckets: Mapping[str, Bucket] | None = None,
        masks: Mapping[int, str] | None = None,
        clone: bool = True,
        cache: GraphCache | None = None,
        warmup: int = 2,
    ) -> None:
        # Libraries set themselves up on the first run.
        arguments.whole("warmup", warmup, 1)
        self.function = function
        self.cache = GraphCache(max_bytes=DEFAULT_MAX_BYTES) if cache is None else cache
        self.clone = clone
        self._axes = tuple(axes)
        self._out_axes = tuple(out_axes)
        self._buckets = dict(buckets or {})
        self._masks = dict(masks or {})
        self._ones: dict[torch.device, Tensor] = {}
        named = set("".join(self._axes))
        if missing := (set(self._buckets) | set("".join(self._out_axes))) - named:
            raise ValueError(f"no argument has the axes {', '.join(sorted(missing))}")
        self._warmup = warmup
        self._token = object()  # in the keys of a cache that may outlive this function
        own = [function] if isinstance(function, nn.Module) else []
        self._watch = ModuleWatch([*own, *modules])

    def __call__(self, *tensors: Tensor | None, **static: Hashable) -> Any:
        if torch.compiler.is_compiling() or is_nested() or self.cache.capturer.capturing():
            return self.function(*tensors, **static)
        reason = self._refusal(tensors, static)
        if reason is None:
            with self.cache.lock:
                try:
                    return self._run(tensors, static)
                except CaptureError as error:
                    reason = str(error)
        self.cache.fall_back(reason)
        return self.function(*tensors, **static)

    def _refusal(self, tensors: Arguments, static: Mapping[str, Hashable]) -> str | None:
        """Why this call cannot be served by a graph, or None."""
        given = [tensor for tensor in tensors if tensor is not None]
        if not given:
            return "no argument is a tensor"
        device = given[0].device
        reason = self.cache.capturer.unavailable(device)
        if reason is not None:
            return reason
        for tensor in given:
            if tensor.device != device:
                return f"arguments are on {device.type} and on {tensor.device.type}"
            if tensor.numel() == 0:
                return "an argument is empty"
        for name, value in static.items():
            try:
                hash(value)
            except TypeError:
                return f"static argument {name} is not hashable"
        reason = self._watch.hooks()
        if reason is None and torch.is_grad_enabled() and self._records_gradients(given):
            return "gradients are recorded, and a replay has none"
        return reason

    def _records_gradients(self, tensors: Iterable[Tensor]) -> bool:
        return any(tensor.requires_grad for tensor in tensors) or self._watch.requires_grad()

    def _sizes(self, tensors: Arguments) -> dict[str, int]:
        """The size of each named axis."""
        sizes: dict[str, int] = {}
        for axes, tensor in zip(self._axes, tensors, strict=False):
            if tensor is not None:
                for axis, size in zip(axes, tensor.shape, strict=False):
                    if sizes.setdefault(axis, size) != size:
                        raise ValueError(f"axis {axis} has size {sizes[axis]} and {size}")
        return sizes

    def _run(self, tensors: Arguments, static: Mapping[str, Hashable]) -> Any:
        sizes = self._sizes(tensors) if self._buckets else {}
        padded = {
            axis: self._buckets[axis](size) if axis in self._buckets else size for axis, size in sizes.items()
        }
        device = next(tensor.device for tensor in tensors if tensor is not None)
        # First of all: whatever was made for earlier calls, on whatever stream, is there from here on.
        self.cache.capturer.order(device)
        cropped = {axis: size for axis, size in sizes.items() if size != padded[axis]}
        for index, axis in self._masks.items():
            if tensors[index] is None and axis in cropped:
                mask = self._one(device).expand([sizes[name] for name in self._axes[index]])
                tensors = (*tensors[:index], mask, *tensors[index + 1 :])
        shapes: list[Shape] = [() if tensor is None else tensor.shape for tensor in tensors]
        if cropped:
            shapes = [self._padded(index, shape, padded) for index, shape in enumerate(shapes)]
        key = (
            self._token,
            tuple(
                None if tensor is None else (shape, tensor.dtype)
                for tensor, shape in zip(tensors, shapes, strict=True)
            ),
            device,
            tuple((name, type(value), value) for name, value in sorted(static.items())),
            ambient(device),
            self._watch.key(),
        )
        entry = self.cache.get(key)
        if entry is None:
            entry = self._capture(key, tensors, static, shapes, device)
        else:
            entry.payload.load(tensors)
        outputs = self.cache.replay(entry)
        return self._results(outputs, cropped)

    def _one(self, device: torch.device) -> Tensor:
        if device not in self._ones:
            with torch.inference_mode(False):
                self._ones[device] = torch.ones((), dtype=torch.uint8, device=device)
        return self._ones[device]

    def _padded(self, index: int, shape: Shape, padded: Mapping[str, int]) -> Shape:
        """The shape of the static buffer for argument ``index``."""
        axes = self._axes[index] if shape and index < len(self._axes) else ""
        return (*(padded[axis] for axis in axes), *shape[len(axes) :])

    def _capture(
        self,
        key: Hashable,
        tensors: Arguments,
        static: Mapping[str, Hashable],
        shapes: Sequence[Shape],
        device: torch.device,
    ) -> Entry:
        reason = self.cache.refused(key)
        if reason is not None:
            raise CaptureError(reason)
        buffers = _Buffers.allocate(tensors, shapes)
        buffers.load(tensors)

        def function() -> Any:
            with uncached_autocast(device):
                outputs = self.function(*buffers.tensors, **static)
            listed = outputs if isinstance(outputs, tuple) else (outputs,)
            if not all(output is None or isinstance(output, Tensor) for output in listed):
                raise CaptureError("the function returns something else than tensors")
            return outputs

        with prepared.read_in_captures(self._watch.promises) as buffers.frozen:
            return self.cache.capture(key, function, device, warmup=self._warmup, payload=buffers)

    def _results(self, outputs: Any, cropped: Mapping[str, int]) -> Any:
        if not isinstance(outputs, tuple):
            return self._result(0, outputs, cropped)
        return tuple(self._result(index, output, cropped) for index, output in enumerate(outputs))

    def _result(self, index: int, output: Tensor | None, cropped: Mapping[str, int]) -> Tensor | None:
        if output is None:
            return None
        if index < len(self._out_axes):
            for axis, name in enumerate(self._out_axes[index]):
                if name in cropped:
                    output = output.narrow(axis, 0, cropped[name])
        return output.clone() if self.clone else output


@contextmanager
def uncached_autocast(device: torch.device) -> Iterator[None]:
    """The autocast of the caller, without its cache of cast weights.

    A cast that was cached outside a graph would stay what it was through all replays, and one that was
    cached inside would be read outside before a replay has computed it.
    """
    if not torch.is_autocast_enabled(device.type):
        yield
        return
    dtype = torch.get_autocast_dtype(device.type)
    with torch.autocast(device.type, dtype, cache_enabled=False):
        yield
