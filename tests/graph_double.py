"""A double of CUDA graphs for any device: it stores a closure over static tensors and runs it again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from trm_kernels.graphs import CaptureError
from trm_kernels.graphs.cache import nested


def _tensors(outputs: Any) -> list[Tensor]:
    listed = outputs if isinstance(outputs, tuple) else (outputs,)
    return [output for output in listed if isinstance(output, Tensor)]


def _poisoned(outputs: Any) -> Any:
    """Allocate memory for ``outputs``, filled with NaN because a capture computes nothing."""
    if isinstance(outputs, tuple):
        return tuple(_poisoned(output) for output in outputs)
    return torch.full_like(outputs, torch.nan) if isinstance(outputs, Tensor) else outputs


class RecordedGraph:
    """Like a CUDA graph, it writes to the same outputs on every replay."""

    def __init__(self, function: Callable[[], Any], outputs: Any, nbytes: int) -> None:
        self.function, self.outputs, self.nbytes = function, outputs, nbytes
        self.replays = 0
        self.released = False

    def replay(self) -> None:
        assert not self.released, "a released graph was replayed"
        self.replays += 1
        with nested():  # a replay runs no Python, so graphed functions inside must not act
            results = self.function()
        for own, new in zip(_tensors(self.outputs), _tensors(results), strict=True):
            own.copy_(new)

    def release(self) -> None:
        self.released = True


class RecordingCapturer:
    """A capturer for tests.

    Args:
        nbytes: Bytes that successive captures report; the last value repeats.
        traced: Whether to run the function during the capture, to get outputs of its shapes. Must be False
            for a function that returns nothing and modifies tensors in place.
    """

    def __init__(self, *nbytes: int, traced: bool = True) -> None:
        self.nbytes = list(nbytes) or [0]
        self.traced = traced
        self.graphs: list[RecordedGraph] = []
        self.pools: list[object] = []
        self.used_pools: list[object] = []
        self.failure: Exception | None = None
        self.warmups = self.asides = self.trims = 0
        self.is_capturing = False

    def unavailable(self, device: torch.device) -> str | None:
        return None

    def capturing(self) -> bool:
        return self.is_capturing

    def new_pool(self) -> object:
        self.pools.append(object())
        return self.pools[-1]

    def capture(
        self, function: Callable[[], Any], device: torch.device, pool: object, warmup: int
    ) -> RecordedGraph:
        for _ in range(warmup):
            self.warmups += 1
            function()
        if self.failure is not None:
            raise CaptureError(f"capturing failed: {self.failure}") from self.failure
        outputs = None
        if self.traced:
            outputs = _poisoned(function())
        self.used_pools.append(pool)
        graph = RecordedGraph(function, outputs, self.nbytes[min(len(self.graphs), len(self.nbytes) - 1)])
        self.graphs.append(graph)
        return graph

    def aside(self, function: Callable[[], Any], device: torch.device) -> Any:
        self.asides += 1
        return function()

    def order(self, device: torch.device) -> None:
        pass

    def trim(self) -> None:
        self.trims += 1


@dataclass(frozen=True)
class _Result:
    """The result of an earlier op in a recording."""

    number: int


class _Recorder(TorchDispatchMode):
    """Records every op with the memory that it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, Any, Any]] = []
        self.results: dict[int, tuple[Tensor, _Result]] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = self.named((args, kwargs or {}))
        outputs = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor) and id(tensor) not in self.results:
                self.results[id(tensor)] = tensor, _Result(len(self.results))
        self.ops.append((op, given, self.named(outputs)))
        return outputs

    def named(self, tree: Any) -> Any:
        """Replace results of earlier ops in ``tree`` by their numbers, and detach other tensors."""
        return tree_map_only(
            Tensor, lambda t: self.results[id(t)][1] if id(t) in self.results else t.detach(), tree
        )


class LaunchingCapturer(RecordingCapturer):
    """As strict as CUDA: a replay runs the captured ops on the same memory.

    The Python code of the function does not run again, so later changes to modules go unnoticed.
    """

    def capture(
        self, function: Callable[[], Any], device: torch.device, pool: object, warmup: int
    ) -> RecordedGraph:
        for _ in range(warmup):
            function()
        with _Recorder() as recorder:
            outputs = recorder.named(function())
        ops = recorder.ops  # not the recorder: views among its results would keep the parameters alive

        def replay() -> Any:
            values: dict[_Result, Any] = {}

            def value(result: _Result) -> Any:
                return values[result]

            for op, given, results in ops:
                args, kwargs = tree_map_only(_Result, value, given)
                for result, tensor in zip(
                    tree_leaves(results), tree_leaves(op(*args, **kwargs)), strict=True
                ):
                    if isinstance(result, _Result):
                        values[result] = tensor
            return tree_map_only(_Result, value, outputs)

        self.graphs.append(RecordedGraph(replay, _poisoned(replay()), self.nbytes[0]))
        return self.graphs[-1]
