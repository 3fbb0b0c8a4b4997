"""Tensors computed on one CUDA stream and read on another: reads wait, and memory stays allocated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.cuda_double import FakeStream, FakeTensor
from trm_kernels import NetworkConfig, TinyRecursiveNetwork, deep_recursion, frozen, use_backend
from trm_kernels.backends import rotary
from trm_kernels.prepared import Frozen


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[FakeStream], None]]:
    """Return a function that makes a stream the current one of every device."""

    def use(stream: FakeStream) -> None:
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)

    yield use
    rotary._cached.cache_clear()


def kept(tensors: list[Any]) -> Callable[[], Any]:
    net = TinyRecursiveNetwork(32, 1, 1).eval()
    freeze, weights = Frozen(net), list(net.parameters())
    freeze.matrices(net, weights, "form", lambda: tensors)
    return lambda: freeze.matrices(net, weights, "form", lambda: [])


def tables(tensors: list[Any]) -> Callable[[], Any]:
    config = NetworkConfig(32, 1, 1, family="paper")
    patch = pytest.MonkeyPatch()
    patch.setattr(rotary, "_make", lambda *_: tuple(tensors))
    rotary._cached.cache_clear()

    def read() -> list[Any]:
        return list(rotary.tables(config, 5, torch.empty(1, 5, 32)))

    read()
    patch.undo()
    return read


@pytest.mark.parametrize("keep", [kept, tables])
def test_another_stream_waits_for_the_producing_stream(
    keep: Callable[[list[Any]], Callable[[], Any]], on: Callable[[FakeStream], None]
) -> None:
    maker, reader = FakeStream(["made"]), FakeStream()
    tensors = [FakeTensor(), FakeTensor()]
    on(maker)
    recall = keep(tensors)
    maker.queue.append("later work, which nobody has to wait for")
    assert recall() == tensors
    assert not maker.events() and not any(tensor.readers for tensor in tensors), (
        "the producing stream must not wait"
    )
    on(reader)
    assert recall() == tensors
    assert reader.waits_for("made") and not reader.waits_for(maker.queue[-1])
    assert all(tensor.readers == [reader] for tensor in tensors), "memory was freed during a read"


@pytest.mark.parametrize("keep", [kept, tables])
def test_on_a_cpu_there_are_no_streams(
    keep: Callable[[list[Any]], Callable[[], Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch.cuda, "current_stream")
    tensors = [torch.ones(2), torch.ones(2)]
    assert all(ours is given for ours, given in zip(keep(tensors)(), tensors, strict=True))
    rotary._cached.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["seed", "paper"])
def test_gpu_two_streams_share_cached_tensors(family: str) -> None:
    net = TinyRecursiveNetwork(256, 2, 4, family=family).cuda().eval()
    x, y, z = (torch.randn(4, 64, 256, device="cuda") for _ in range(3))

    def run() -> torch.Tensor:
        with torch.no_grad(), use_backend("triton"):
            return deep_recursion(net, x, y, z, 2, 1)[0]

    expected = run()
    for _ in range(10):
        rotary._cached.cache_clear()
        maker, reader = torch.cuda.Stream(), torch.cuda.Stream()
        torch.cuda.synchronize()
        with frozen(net):
            with torch.cuda.stream(maker):
                torch.cuda._sleep(50_000_000)
                run()
            with torch.cuda.stream(reader):
                found = run()
        rotary._cached.cache_clear()
        with torch.cuda.stream(maker):
            junk = [torch.full((256, 256), torch.nan, device="cuda") for _ in range(64)]
        torch.cuda.synchronize()
        assert torch.equal(found, expected)
        del junk
