"""Graph capture: the protocol that the cache uses, and its CUDA implementation."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

# Read once, like TRM_BACKEND; later changes in the process have no effect.
_SETTING = os.environ.get("TRM_GRAPHS") or "1"

#: During a capture, no thread may synchronise the device or empty the allocator's cache, which would fail and
#: may invalidate the capture. Up to at least torch 2.11, no thread can draw random numbers on the device
#: either. This lock therefore serialises captures with their warm-ups, releases and trims of all caches.
_CAPTURE_LOCK = threading.RLock()


class CaptureError(RuntimeError):
    """The function runs but cannot be captured. The message is the reason."""


class Captured(Protocol):
    """A captured graph.

    Attributes:
        outputs: Outputs of the function during the capture: tensors that every replay overwrites.
        nbytes: Growth of the memory pool in bytes.
    """

    outputs: Any
    nbytes: int

    def replay(self) -> None:
        """Run the captured work again on the current stream."""

    def release(self) -> None:
        """Release the graph and its part of the pool."""


class Capturer(Protocol):
    """Captures graphs. Tests replace it with a double."""

    def unavailable(self, device: torch.device) -> str | None:
        """Return why nothing on ``device`` can be captured, or None."""

    def capturing(self) -> bool:
        """Whether the current stream is being captured, by any code."""

    def new_pool(self) -> Any:
        """Return the handle of a new memory pool that graphs share."""

    def capture(self, function: Callable[[], Any], device: torch.device, pool: Any, warmup: int) -> Captured:
        """Run ``function`` ``warmup`` times, then capture it.

        Raises:
            CaptureError: If it runs but cannot be captured. Exceptions of the function itself propagate.
        """

    def aside(self, function: Callable[[], Any], device: torch.device) -> Any:
        """Run ``function`` on the capture stream, ordered between earlier and later work of this stream."""

    def order(self, device: torch.device) -> None:
        """Make the current stream wait for the stream that last used graphs, because they share pools."""

    def trim(self) -> None:
        """Free the memory of pools without graphs."""


def disabled() -> str | None:
    """Return why the environment disables graphs, or None.

    Raises:
        ValueError: If ``TRM_GRAPHS`` is neither 0 nor 1.
    """
    if _SETTING not in ("0", "1"):
        raise ValueError(f"TRM_GRAPHS: {_SETTING[:40]!r} is neither 0 nor 1: choose one of them")
    return "TRM_GRAPHS=0" if _SETTING == "0" else None


class _CudaGraph:
    """A :class:`Captured` CUDA graph."""

    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: Any, nbytes: int, device: torch.device) -> None:
        self.outputs = outputs
        self.nbytes = nbytes
        self._graph = graph
        self._device = device

    def replay(self) -> None:
        self._graph.replay()

    def release(self) -> None:
        # A replay may still be running on memory that is about to be reused.
        with _CAPTURE_LOCK:
            torch.cuda.synchronize(self._device)
            self.outputs = None
            self._graph.reset()


class CudaCapturer:
    """Captures CUDA graphs (``torch.cuda.graph``) on one side stream per device.

    Dropout draws new random numbers in every replay: the capture registers the device's default generator,
    and a replay advances it as an eager call would. A warm-up restores the generator's state. Other
    generators need manual registration, which this class does not do, so capturing a function that draws
    from one raises an error.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._last: dict[torch.device, torch.cuda.Stream] = {}

    def unavailable(self, device: torch.device) -> str | None:
        reason = disabled()
        if reason is None and device.type != "cuda":
            reason = f"the tensors are on the {device.type}, but graphs need CUDA"
        return reason

    def capturing(self) -> bool:
        # The query raises in builds without CUDA and without a driver, where nothing can be captured.
        return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()

    def new_pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def aside(self, function: Callable[[], Any], device: torch.device) -> Any:
        # Warm-up must run on the capture stream: libraries create workspaces per stream, and autograd's
        # accumulation nodes remember the stream on which they were created.
        with torch.cuda.device(device):
            current, side = torch.cuda.current_stream(), self._side(device)
            side.wait_stream(current)
            try:
                with torch.cuda.stream(side):
                    return function()
            finally:
                current.wait_stream(side)

    def capture(self, function: Callable[[], Any], device: torch.device, pool: Any, warmup: int) -> Captured:
        with _CAPTURE_LOCK, torch.cuda.device(device):
            if warmup:
                generator = torch.cuda.default_generators[torch.cuda.current_device()]
                state = generator.get_state()
                try:
                    for _ in range(warmup):
                        self.aside(function, device)
                finally:
                    generator.set_state(state)
            return self._capture(function, device, pool)

    def _capture(self, function: Callable[[], Any], device: torch.device, pool: Any) -> Captured:
        side = self._side(device)
        side.wait_stream(torch.cuda.current_stream())
        # Free cached blocks of other streams first, so that all further growth belongs to the pool.
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(device)
        graph = torch.cuda.CUDAGraph()
        cause: Exception | None = None
        try:
            # The outer stream context restores the stream if torch.cuda.graph does not: when the capture was
            # invalidated, its exit raises before it leaves the side stream. thread_local, because other
            # threads that pin memory or query events must not invalidate the capture.
            with (
                torch.cuda.stream(side),
                _no_collection(),
                torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"),
            ):
                try:
                    outputs = function()
                except Exception as error:
                    cause = error
                    raise
        except Exception as error:
            _abandon(graph, device, pool)
            _wake_generator(side, device)
            # Ending an invalidated capture raises too, but the function's exception is the cause.
            raise CaptureError(f"capturing failed: {describe(cause or error)}") from error
        return _CudaGraph(graph, outputs, torch.cuda.memory_reserved(device) - before, device)

    def order(self, device: torch.device) -> None:
        current = torch.cuda.current_stream(device)
        last = self._last.get(device)
        if last is None:
            self._last[device] = current
        elif last != current:
            current.wait_stream(last)
            self._last[device] = current

    def trim(self) -> None:
        with _CAPTURE_LOCK:
            torch.cuda.empty_cache()

    def _side(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


def describe(error: BaseException) -> str:
    """Format an exception as one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _abandon(graph: torch.cuda.CUDAGraph, device: torch.device, pool: Any) -> None:
    """Clean up after a failed capture."""
    # Up to torch 2.11, a failed capture leaves the allocator recording into the pool. In later versions,
    # ending it a second time raises.
    with contextlib.suppress(RuntimeError, AttributeError):
        torch._C._cuda_endAllocateToPool(device.index, pool)
    with contextlib.suppress(RuntimeError):
        graph.reset()


def _wake_generator(side: torch.cuda.Stream, device: torch.device) -> None:
    """Make the random generator usable again after a failed capture.

    In torch 2.11 the generator still assumes a capture, and the next draw outside one raises ``Offset
    increment outside graph capture``. The end of a successful capture resets that state.
    """
    with contextlib.suppress(RuntimeError), torch.cuda.stream(side):
        number = torch.zeros(1, device=device)
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=side, capture_error_mode="thread_local"):
            number.zero_()


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Disable garbage collection, because freeing older objects may make calls that a capture forbids."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def unavailable() -> str | None:
    """Return why no graph can be captured in this process, or None; captures and replays a tiny graph."""
    reason = disabled()
    if reason is not None:
        return reason
    if not torch.cuda.is_available():
        return "no CUDA device"
    value = torch.zeros(1, device="cuda")
    capturer = CudaCapturer()

    def function() -> Tensor:
        return value + 1

    try:
        captured = capturer.capture(function, value.device, capturer.new_pool(), warmup=1)
    except (CaptureError, RuntimeError) as error:
        return str(error)
    value.fill_(1)
    captured.replay()
    right = captured.outputs.item() == 2
    captured.release()
    return None if right else "a captured graph computed a wrong result"
