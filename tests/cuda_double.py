"""A double of ``torch.cuda`` for captures: streams that record work, and calls that a capture forbids."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch


@dataclass(eq=False)
class FakeStream:
    """Records its work in order."""

    queue: list[object] = field(default_factory=list)

    def record_event(self) -> tuple[FakeStream, int]:
        """Return the event: everything enqueued on this stream so far."""
        return self, len(self.queue)

    def wait_event(self, event: tuple[FakeStream, int]) -> None:
        self.queue.append(event)

    def wait_stream(self, other: FakeStream) -> None:
        self.wait_event(other.record_event())

    def events(self) -> list[tuple[FakeStream, int]]:
        return [item for item in self.queue if isinstance(item, tuple)]

    def waits_for(self, work: object) -> bool:
        """Whether further work on this stream runs after ``work``."""
        earlier = [maker.queue[:length] for maker, length in self.events()]
        return work in self.queue or any(work in queue for queue in earlier)


class FakeTensor:
    """A tensor that :mod:`trm_kernels.streams` considers to be on a GPU."""

    is_cuda = True
    device = torch.device("cuda", 0)

    def __init__(self) -> None:
        self.readers: list[FakeStream] = []

    def record_stream(self, stream: FakeStream) -> None:
        self.readers.append(stream)


class FakeGraph:
    """Captures nothing and counts calls."""

    def __init__(self) -> None:
        self.replays = self.resets = 0

    def replay(self) -> None:
        self.replays += 1

    def reset(self) -> None:
        self.resets += 1


class FakeCuda:
    """Replaces the functions of ``torch.cuda`` that captures call.

    If any thread synchronises the device during a capture, that fails and invalidates the capture; emptying
    the allocator's cache fails. The generator is unusable from the start of a capture until the end of a
    valid one, as in torch 2.11.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.default = FakeStream()
        self.local = threading.local()
        self.captures: list[threading.Thread] = []
        self.abandoned: list[object] = []
        self.spoiled = self.asleep = False
        for name in (
            "current_stream", "stream", "synchronize", "empty_cache", "graph", "is_current_stream_capturing"
        ):  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream())
        monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
        monkeypatch.setattr(torch.cuda, "device", lambda device: self.stream(self.current_stream()))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "default_generators", (torch.default_generator,))
        # Missing in builds without CUDA.
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end_allocate_to_pool, raising=False)

    def current_stream(self, device: object = None) -> FakeStream:
        found: FakeStream = getattr(self.local, "stream", self.default)
        return found

    def is_current_stream_capturing(self) -> bool:
        return threading.current_thread() in self.captures

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.local.stream = self.current_stream(), stream
        try:
            yield
        finally:
            self.local.stream = before

    def synchronize(self, device: object = None) -> None:
        if self.captures:
            self.spoiled = True
            raise RuntimeError("operation not permitted when stream is capturing")

    def empty_cache(self) -> None:
        if self.captures:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    def draw(self) -> None:
        """Draw a random number outside a capture."""
        if self.asleep:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")

    def end_allocate_to_pool(self, device: int, pool: object) -> None:
        self.abandoned.append(pool)

    @contextmanager
    def graph(self, graph: FakeGraph, *, stream: FakeStream, **options: Any) -> Iterator[None]:
        self.synchronize()
        self.local.stream = stream
        thread = threading.current_thread()
        self.captures.append(thread)
        self.asleep = True
        before = torch.cuda.current_stream()
        try:
            yield
        finally:
            self.captures.remove(thread)
            if self.spoiled:
                self.spoiled = False
                # As in torch, the stream stays the current one.
                raise RuntimeError("operation failed due to a previous error during capture")
            self.asleep = False
            self.local.stream = before
