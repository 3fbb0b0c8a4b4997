"""How work becomes a graph: the protocol that the cache speaks, and CUDA's implementation of it."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

# Read once, like TRM_BACKEND: a change later in the process has no effect.
_SETTING = os.environ.get("TRM_GRAPHS") or "1"

#: While a stream is captured, no thread may synchronise its device or empty the allocator's cache: that
#: fails, and may spoil the capture; and up to torch 2.11 at least none can draw random numbers on it. So
#: captures with their warm-ups, releases and trims of all caches take turns.
_ALONE = threading.RLock()


class CaptureError(RuntimeError):
    """Work that runs, but cannot be captured; the message is the reason."""


class Captured(Protocol):
    """A graph that was captured.

    Attributes:
        outputs: What the function returned while it was captured: tensors that every replay rewrites.
        nbytes: Bytes by which the memory pool grew.
    """

    outputs: Any
    nbytes: int

    def replay(self) -> None:
        """Run the captured work again on the current stream."""

    def release(self) -> None:
        """Give the graph and its share of the pool back."""


class Capturer(Protocol):
    """What captures; tests put a double in its place."""

    def unavailable(self, device: torch.device) -> str | None:
        """Why nothing on ``device`` can be captured, or None."""

    def capturing(self) -> bool:
        """Whether the current stream is being captured, by whomever."""

    def new_pool(self) -> Any:
        """A handle of a new memory pool that graphs share."""

    def capture(self, function: Callable[[], Any], device: torch.device, pool: Any, warmup: int) -> Captured:
        """Run ``function`` ``warmup`` times, then capture it.

        Raises:
            CaptureError: It ran, and could not be captured. What it raises when it runs passes through.
        """

    def aside(self, function: Callable[[], Any], device: torch.device) -> Any:
        """Run ``function`` on the stream that captures, between earlier and later work of this one."""

    def order(self, device: torch.device) -> None:
        """Let the current stream wait for the one that used graphs last: pools are shared."""

    def trim(self) -> None:
        """Return the memory of pools without graphs to the device."""


def disabled() -> str | None:
    """Why the environment turns graphs off, or None."""
    if _SETTING == "1":
        return None
    return "TRM_GRAPHS=0" if _SETTING == "0" else f"TRM_GRAPHS={_SETTING} is neither 0 nor 1"


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
        # A replay may still be under way, and its memory is about to be given to others.
        with _ALONE:
            torch.cuda.synchronize(self._device)
            self.outputs = None
            self._graph.reset()


class CudaCapturer:
    """Captures CUDA graphs (``torch.cuda.graph``), one side stream for each device.

    Dropout draws fresh numbers on every replay: capturing registers the default generator of the device, and
    a replay advances it as the plain call would. A warm-up leaves the generator where it was. Other
    generators must be registered by hand, which this class does not do: a function that draws from one
    cannot be captured, and says so.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._last: dict[torch.device, torch.cuda.Stream] = {}

    def unavailable(self, device: torch.device) -> str | None:
        reason = disabled()
        if reason is None and device.type != "cuda":
            reason = f"the tensors are on the {device.type}, graphs are CUDA's"
        return reason

    def capturing(self) -> bool:
        # Nothing is captured where CUDA is not in use, and asking there raises: in builds without it, and
        # without a driver.
        return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()

    def new_pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def aside(self, function: Callable[[], Any], device: torch.device) -> Any:
        # Work that precedes a capture runs on its stream: libraries create their workspaces for each stream,
        # and autograd's accumulation nodes remember the stream that they were made on.
        with torch.cuda.device(device):
            current, side = torch.cuda.current_stream(), self._side(device)
            side.wait_stream(current)
            try:
                with torch.cuda.stream(side):
                    return function()
            finally:
                current.wait_stream(side)

    def capture(self, function: Callable[[], Any], device: torch.device, pool: Any, warmup: int) -> Captured:
        with _ALONE, torch.cuda.device(device):
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
        # What other streams have cached is returned first: all growth from here on is the pool's.
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(device)
        graph = torch.cuda.CUDAGraph()
        cause: Exception | None = None
        try:
            # The outer stream context restores the stream where torch.cuda.graph fails to: its exit raises
            # before it leaves the side stream when the capture was invalidated. Threads that pin memory or
            # query events must not spoil a capture, so it is local to this thread.
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
            # The end of an invalidated capture raises too; what the function met came first.
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
        with _ALONE:
            torch.cuda.empty_cache()

    def _side(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


def describe(error: BaseException) -> str:
    """An exception as one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _abandon(graph: torch.cuda.CUDAGraph, device: torch.device, pool: Any) -> None:
    """Clean up after a capture that failed."""
    # Up to torch 2.11 a capture that ends in an error leaves the allocator recording into the pool. Where it
    # does not, ending it a second time raises.
    with contextlib.suppress(RuntimeError, AttributeError):
        torch._C._cuda_endAllocateToPool(device.index, pool)
    with contextlib.suppress(RuntimeError):
        graph.reset()


def _wake_generator(side: torch.cuda.Stream, device: torch.device) -> None:
    """Let random numbers be drawn again after a capture that failed.

    In torch 2.11 the generator believes that the capture goes on, and the next draw outside of one raises
    (``Offset increment outside graph capture``). The end of a capture that succeeds tells it otherwise.
    """
    with contextlib.suppress(RuntimeError), torch.cuda.stream(side):
        number = torch.zeros(1, device=device)
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=side, capture_error_mode="thread_local"):
            number.zero_()


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection inside: freeing what earlier work left behind may call what a capture forbids."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def unavailable() -> str | None:
    """Why no graph can be captured in this process, or None; it captures and replays a tiny one to know."""
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
