"""Conditions of a capture, with a double of ``torch.cuda``: streams, threads, forbidden calls."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.cuda_double import FakeCuda, FakeStream, FakeTensor
from trm_kernels import GraphCache, GraphedFunction
from trm_kernels.graphs import CaptureError, CudaCapturer
from trm_kernels.graphs.function import _Buffers
from trm_kernels.streams import Shared

DEVICE = torch.device("cpu")  # of the few real tensors


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def in_threads(*functions: Callable[[], object]) -> None:
    """Run the functions concurrently; raises if one of them raises."""
    errors: list[BaseException] = []

    def guarded(function: Callable[[], object]) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def capture(capturer: CudaCapturer, function: Callable[[], object]) -> object:
    return capturer.capture(function, DEVICE, capturer.new_pool(), warmup=0)


def test_captures_of_two_caches_are_serialised(cuda: FakeCuda) -> None:
    """Each synchronises the device first, which would invalidate the other."""
    inside = threading.Event()

    def function() -> None:
        inside.set()
        threading.Event().wait(0.05)  # long enough for the other thread to start

    def second() -> None:
        inside.wait()
        capture(CudaCapturer(), function)

    in_threads(lambda: capture(CudaCapturer(), function), second)


def test_a_warm_up_draws_random_numbers_while_nobody_captures(cuda: FakeCuda) -> None:
    inside = threading.Event()

    def function() -> None:
        inside.set()
        threading.Event().wait(0.05)

    def draws() -> None:
        if not torch.cuda.is_current_stream_capturing():
            cuda.draw()

    def second() -> None:
        inside.wait()
        capturer = CudaCapturer()
        capturer.capture(draws, DEVICE, capturer.new_pool(), warmup=1)

    in_threads(lambda: capture(CudaCapturer(), function), second)


@pytest.mark.parametrize("disturb", ["release", "trim"])
def test_a_capture_is_not_disturbed_by_another_cache(cuda: FakeCuda, disturb: str) -> None:
    other = CudaCapturer()
    captured = other.capture(lambda: None, DEVICE, other.new_pool(), warmup=0)
    inside = threading.Event()

    def function() -> None:
        inside.set()
        threading.Event().wait(0.05)

    def evict() -> None:
        inside.wait()
        captured.release() if disturb == "release" else other.trim()

    in_threads(lambda: capture(CudaCapturer(), function), evict)


def test_a_failed_capture_leaves_the_stream_and_reports_the_reason(cuda: FakeCuda) -> None:
    capturer = CudaCapturer()

    def waits() -> None:
        torch.cuda.synchronize()

    with pytest.raises(CaptureError, match="capturing failed: RuntimeError: operation not permitted"):
        capture(capturer, waits)
    assert torch.cuda.current_stream() is cuda.default
    assert len(cuda.abandoned) == 1, "the allocator would continue recording"
    cuda.draw()
    capture(capturer, lambda: None)


def test_warm_up_runs_on_the_capture_stream_between_earlier_and_later_work(cuda: FakeCuda) -> None:
    capturer = CudaCapturer()
    cuda.default.queue.append("earlier")
    streams: list[FakeStream] = []

    def function() -> None:
        streams.append(torch.cuda.current_stream())  # type: ignore[arg-type]
        assert streams[-1].waits_for("earlier")
        streams[-1].queue.append("work")

    capturer.capture(function, DEVICE, capturer.new_pool(), warmup=2)
    assert len(streams) == 3 and len(set(streams)) == 1 and streams[0] is not cuda.default
    assert cuda.default.waits_for("work")


def test_streams_are_ordered_on_a_cache(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for tensors created once for all calls, even if a call has no graph."""
    monkeypatch.setattr(CudaCapturer, "unavailable", lambda self, device: None)
    fast = GraphedFunction(
        lambda x, mask: x * mask[..., None],
        axes=("BL", "BL"),
        buckets={"L": lambda size: 8},
        masks={1: "L"},
        cache=GraphCache(),
    )

    def note(work: str) -> Tensor:
        stream: FakeStream = torch.cuda.current_stream()  # type: ignore[assignment]
        stream.queue.append(f"{work} by {id(stream)}")
        return torch.ones((), dtype=torch.uint8)

    monkeypatch.setattr(fast, "_one", lambda device: note("ones"))
    monkeypatch.setattr(torch, "_foreach_copy_", lambda targets, sources: note("copied"))
    first, second = FakeStream(), FakeStream()
    for stream in (first, second):
        with torch.cuda.stream(stream):  # type: ignore[arg-type]
            fast(torch.ones(1, 5, 2), None)
    assert second.waits_for(f"copied by {id(first)}")
    waited = second.queue.index(second.events()[0])
    assert waited < second.queue.index(f"ones by {id(second)}")


def test_memory_of_replays_is_kept_for_every_stream(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """A function may be deleted during its last replay, on a different stream than the first."""
    monkeypatch.setattr(torch, "_foreach_copy_", lambda targets, sources: None)
    buffer = FakeTensor()
    maker, other = FakeStream(), FakeStream()
    with torch.cuda.stream(maker):  # type: ignore[arg-type]
        buffers = _Buffers((None,), [()], Shared([buffer]))  # type: ignore[list-item]
    for stream in (maker, other):
        with torch.cuda.stream(stream):  # type: ignore[arg-type]
            buffers.load((None,))
    assert buffer.readers == [other]
