"""A function of tensors, replayed as a CUDA graph."""

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

#: Maximum pool memory of a function's own cache.
DEFAULT_MAX_BYTES = 8 << 30

Arguments = tuple[Tensor | None, ...]
Shape = tuple[int, ...]


@dataclass
class _Buffers:
    """Static inputs of one graph. :meth:`load` writes them before a replay."""

    tensors: tuple[Tensor | None, ...]
    loaded: list[Shape]
    shared: Shared
    #: Matrices of frozen networks that the graph reads, kept because a thaw may occur during a replay.
    frozen: list[Tensor] = field(default_factory=list)

    @classmethod
    def allocate(cls, arguments: Arguments, shapes: Sequence[Shape]) -> _Buffers:
        # Tensors created in inference mode cannot be modified outside it.
        with torch.inference_mode(False), torch.no_grad():
            tensors = tuple(
                None if argument is None else torch.zeros(shape, dtype=argument.dtype, device=argument.device)
                for argument, shape in zip(arguments, shapes, strict=True)
            )
        return cls(tensors, [shape for shape in shapes], Shared([t for t in tensors if t is not None]))

    def load(self, arguments: Arguments) -> None:
        """Copy ``arguments`` into the buffers, with zeros around them."""
        self.shared.read()  # the function may be deleted during this stream's replay
        targets, sources = [], []
        for index, (buffer, argument) in enumerate(zip(self.tensors, arguments, strict=True)):
            if buffer is None or argument is None:
                continue
            shape = argument.shape
            if shape != self.loaded[index]:
                if any(old > new for old, new in zip(self.loaded[index], shape, strict=True)):
                    buffer.zero_()  # the previous argument was larger
                self.loaded[index] = shape
            targets.append(buffer if shape == buffer.shape else _corner(buffer, shape))
            sources.append(argument)
        torch._foreach_copy_(targets, sources)


def _corner(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the part of ``tensor`` with ``shape`` that starts at its origin."""
    for axis, size in enumerate(shape):
        if tensor.shape[axis] != size:
            tensor = tensor.narrow(axis, 0, size)
    return tensor


class GraphedFunction:
    """Captures ``function`` as one CUDA graph per kind of call, and replays it.

    A call ``graphed(*tensors, **static)`` copies the tensors into static buffers, replays the graph, and
    returns copies of the outputs. Calls share a graph if they have the same (bucketed) shapes, dtypes,
    device, static arguments, grad and inference mode, autocast, float32 matmul precision and backend, and if
    the storage of the watched modules' parameters is the same. The next replay sees values written in place;
    new storage triggers a new capture. Dropout draws new random numbers in every replay.

    A call that cannot be captured runs eagerly: :meth:`GraphCache.status` counts it under its reason, and
    each reason triggers one warning. A call inside another capture or ``torch.compile`` calls the function.

    Args:
        function: Called as ``function(*tensors, **static)``; returns a tensor, or a tuple of tensors and
            None. It must not modify its arguments or read tensors on the host, and must launch the same
            kernels for the same kind of call. Any tensors it reads other than its arguments and ``modules``
            are read at the addresses they had at capture.
        modules: The modules that it reads. ``function`` itself, if it is a module, is included.
        axes: For bucketing, one string per tensor argument that names its leading axes: ``"BL"``. An argument
            that may be None still needs a string.
        out_axes: The same for the outputs.
        buckets: Rounds the size of a named axis up; axes without a bucket stay exact. Arguments are padded
            with zeros at the end and outputs are cropped. The function must prevent padding from affecting
            the rest, for example with a mask.
        masks: Which arguments are masks, and of which axis: ``{3: "L"}``. If a call needs padding along that
            axis and passes None as the mask, the graph receives ones, padded with zeros.
        clone: Whether outputs are copies. Otherwise they are views of the graph's memory, valid until the
            next call of any function that shares the cache.
        cache: Stores the graphs; several functions may share one cache.
        warmup: Number of runs before a capture.
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
        # Libraries initialise themselves in the first run.
        arguments.integer("warmup", warmup, 1)
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
        self._token = object()  # part of the keys of a cache that may outlive this function
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
        """Return why this call cannot use a graph, or None."""
        given = [tensor for tensor in tensors if tensor is not None]
        if not given:
            return "no argument is a tensor"
        device = given[0].device
        reason = self.cache.capturer.unavailable(device)
        if reason is not None:
            return reason
        for tensor in given:
            if tensor.device != device:
                return f"arguments are on {device.type} and {tensor.device.type}"
            if tensor.numel() == 0:
                return "an argument is empty"
        for name, value in static.items():
            try:
                hash(value)
            except TypeError:
                return f"static argument {name} is not hashable"
        reason = self._watch.hooks()
        if reason is None and torch.is_grad_enabled() and self._records_gradients(given):
            return "gradients are recorded, which a replay does not support"
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
                        raise ValueError(f"axis {axis} has sizes {sizes[axis]} and {size}")
        return sizes

    def _run(self, tensors: Arguments, static: Mapping[str, Hashable]) -> Any:
        sizes = self._sizes(tensors) if self._buckets else {}
        padded = {
            axis: self._buckets[axis](size) if axis in self._buckets else size for axis, size in sizes.items()
        }
        device = next(tensor.device for tensor in tensors if tensor is not None)
        # Before anything else: wait for tensors that earlier calls created on other streams.
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
        """Return the shape of the static buffer for argument ``index``."""
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
                raise CaptureError("the function returns something other than tensors")
            return outputs

        with prepared.read_in_captures(self._watch.freeze_ids) as buffers.frozen:
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
    """Apply the caller's autocast without its weight cache.

    All replays would read a stale cast that was cached outside the graph, and code outside would read a cast
    that was cached inside before a replay has computed it.
    """
    if not torch.is_autocast_enabled(device.type):
        yield
        return
    dtype = torch.get_autocast_dtype(device.type)
    with torch.autocast(device.type, dtype, cache_enabled=False):
        yield
