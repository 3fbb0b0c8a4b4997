"""Captured graphs, bounded in number and in bytes, and what became of calls that none could serve."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from trm_kernels import arguments
from trm_kernels.graphs.capture import Captured, CaptureError, Capturer, CudaCapturer

#: How many keys that could not be captured a cache remembers, so as not to try them on every call.
_REFUSED = 1024


class GraphFallbackWarning(RuntimeWarning):
    """A call runs without a graph, though a graph was asked for; given once for each reason."""


@dataclass(frozen=True)
class GraphStatus:
    """What graphs did.

    Attributes:
        graphs: Graphs alive.
        nbytes: Bytes of the memory pools that hold what they compute with.
        captures, replays, evictions: How often each happened.
        fallbacks: How many calls ran without a graph, by reason.
    """

    graphs: int = 0
    nbytes: int = 0
    captures: int = 0
    replays: int = 0
    evictions: int = 0
    fallbacks: dict[str, int] = field(default_factory=dict)


@dataclass(eq=False)
class _Pool:
    """Memory that several graphs share, and which comes back only when all of them are gone."""

    handle: Any
    device: torch.device
    nbytes: int = 0
    graphs: int = 0


@dataclass(eq=False)
class Entry:
    """One captured graph, and what its caller keeps beside it."""

    captured: Captured
    pool: _Pool
    payload: Any = None


class GraphCache:
    """Least recently used graphs make room for new ones.

    Graphs that share a memory pool reuse each other's temporaries, so they must never run at the same time:
    a cache runs one at a time (:attr:`lock`) and orders streams. A pool's memory returns to the device only
    with the last of its graphs. So a cache opens a new pool whenever the newest holds a quarter of
    ``max_bytes``, and gives up whole pools, the one that was used longest ago first, when all of them hold
    more than ``max_bytes``.

    Args:
        max_graphs: Graphs kept at most.
        max_bytes: Bytes of pool memory kept at most; None for no bound. A graph that alone needs more is
            refused. The static inputs and what the driver keeps for each graph are not counted.
        capturer: What captures; CUDA graphs by default.
    """

    def __init__(
        self, max_graphs: int = 64, max_bytes: int | None = None, *, capturer: Capturer | None = None
    ) -> None:
        arguments.whole("max_graphs", max_graphs, 1)
        if max_bytes is not None:
            arguments.whole("max_bytes", max_bytes, 0)
        self.max_graphs = max_graphs
        self.max_bytes = max_bytes
        self.capturer: Capturer = CudaCapturer() if capturer is None else capturer
        self.lock = threading.RLock()
        self._entries: OrderedDict[Hashable, Entry] = OrderedDict()
        self._pools: list[_Pool] = []
        self._open: dict[torch.device, _Pool] = {}
        self._refused: OrderedDict[Hashable, str] = OrderedDict()
        self._counts: Counter[str] = Counter()
        self._fallbacks: Counter[str] = Counter()
        _CACHES.add(self)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes that the memory pools hold."""
        return sum(pool.nbytes for pool in self._pools)

    def status(self) -> GraphStatus:
        """What this cache holds and did."""
        with self.lock:
            return GraphStatus(
                graphs=len(self._entries),
                nbytes=self.nbytes,
                captures=self._counts["captures"],
                replays=self._counts["replays"],
                evictions=self._counts["evictions"],
                fallbacks=dict(self._fallbacks),
            )

    def get(self, key: Hashable) -> Entry | None:
        """The graph of ``key``, which becomes the most recently used one."""
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def refused(self, key: Hashable) -> str | None:
        """Why ``key`` could not be captured when that was tried, or None."""
        return self._refused.get(key)

    def replay(self, entry: Entry) -> Any:
        """Run a graph again; its outputs, which the next replay in this cache may overwrite."""
        entry.captured.replay()
        self._counts["replays"] += 1
        return entry.captured.outputs

    def capture(
        self,
        key: Hashable,
        function: Callable[[], Any],
        device: torch.device,
        *,
        warmup: int = 0,
        payload: Any = None,
    ) -> Entry:
        """Capture ``function`` under ``key``.

        Raises:
            CaptureError: It runs, but cannot be captured; :meth:`refused` tells so from then on. The other
                graphs are sound. What ``function`` raises when it runs passes through.
        """
        with nested():
            while len(self._entries) >= self.max_graphs:
                self._evict(next(iter(self._entries)))
            entry = self._capture(key, function, device, warmup)
            if self._is_full() and not self._alone_too_large(entry):
                self._give_up_pools(keep=entry.pool)
                if self._is_full():
                    # The newest pool holds too much: a fresh one tells what this graph alone needs.
                    self._evict_pool(entry.pool)
                    entry = self._capture(key, function, device, 0)
            if self._alone_too_large(entry):
                self._evict_pool(entry.pool)
                raise self._refuse(key, f"a graph needs more than the cache's {self.max_bytes} bytes")
        entry.payload = payload
        return entry

    def clear(self) -> None:
        """Drop all graphs and return their memory; keys that were refused are tried again."""
        with self.lock:
            for pool in list(self._pools):
                self._evict_pool(pool)
            self._refused.clear()

    def fall_back(self, reason: str, *, warn: bool = True) -> None:
        """Count a call that runs without a graph, and warn of a reason that is new in this process."""
        with self.lock:
            self._fallbacks[reason] += 1
        if warn and reason not in _WARNED:
            _WARNED.add(reason)
            warnings.warn(f"running without a CUDA graph: {reason}", GraphFallbackWarning, stacklevel=3)

    def _capture(
        self, key: Hashable, function: Callable[[], Any], device: torch.device, warmup: int
    ) -> Entry:
        pool = self._open_pool(device)
        try:
            captured = self.capturer.capture(function, device, pool.handle, warmup)
        except CaptureError as error:
            # It may have left traces in the pool: the next graphs use another. And it may have failed for
            # want of memory, which the plain call is to find.
            del self._open[device]
            self.capturer.trim()
            raise self._refuse(key, str(error)) from error
        self._counts["captures"] += 1
        pool.nbytes += captured.nbytes
        pool.graphs += 1
        if pool.graphs == 1:
            self._pools.append(pool)
        entry = self._entries[key] = Entry(captured, pool)
        return entry

    def _refuse(self, key: Hashable, reason: str) -> CaptureError:
        self._refused[key] = reason
        while len(self._refused) > _REFUSED:
            self._refused.popitem(last=False)
        return CaptureError(reason)

    def _is_full(self) -> bool:
        return self.max_bytes is not None and self.nbytes > self.max_bytes

    def _alone_too_large(self, entry: Entry) -> bool:
        return self.max_bytes is not None and entry.pool.graphs == 1 and entry.pool.nbytes > self.max_bytes

    def _open_pool(self, device: torch.device) -> _Pool:
        pool = self._open.get(device)
        if pool is None or (self.max_bytes is not None and 4 * pool.nbytes > self.max_bytes):
            pool = self._open[device] = _Pool(self.capturer.new_pool(), device)
        return pool

    def _give_up_pools(self, keep: _Pool) -> None:
        # Later uses overwrite earlier ones: the order in which pools were last used.
        used = {entry.pool: when for when, entry in enumerate(self._entries.values())}
        for pool in sorted(used, key=lambda pool: used[pool]):
            if pool is not keep and self._is_full():
                self._evict_pool(pool)

    def _evict_pool(self, pool: _Pool) -> None:
        for key in [key for key, entry in self._entries.items() if entry.pool is pool]:
            self._evict(key)

    def _evict(self, key: Hashable) -> None:
        entry = self._entries.pop(key)
        entry.captured.release()
        self._counts["evictions"] += 1
        pool = entry.pool
        pool.graphs -= 1
        if pool.graphs == 0:
            self._pools.remove(pool)
            if self._open.get(pool.device) is pool:
                del self._open[pool.device]
            self.capturer.trim()


_CACHES: weakref.WeakSet[GraphCache] = weakref.WeakSet()
_WARNED: set[str] = set()
_local = threading.local()


@contextmanager
def nested() -> Iterator[None]:
    """Inside, graphed functions simply run: they are part of a graph that another one captures."""
    previous, _local.nested = is_nested(), True
    try:
        yield
    finally:
        _local.nested = previous


def is_nested() -> bool:
    """Whether this thread is inside :func:`nested`."""
    return getattr(_local, "nested", False)


def graph_status() -> GraphStatus:
    """What all graph caches of this process hold and did; a cache's own is :meth:`GraphCache.status`."""
    statuses = [cache.status() for cache in list(_CACHES)]
    fallbacks: Counter[str] = Counter()
    for status in statuses:
        fallbacks.update(status.fallbacks)
    return GraphStatus(
        graphs=sum(status.graphs for status in statuses),
        nbytes=sum(status.nbytes for status in statuses),
        captures=sum(status.captures for status in statuses),
        replays=sum(status.replays for status in statuses),
        evictions=sum(status.evictions for status in statuses),
        fallbacks=dict(fallbacks),
    )
