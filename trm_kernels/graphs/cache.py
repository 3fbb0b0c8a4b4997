"""A cache of captured graphs, limited in number and bytes, which counts the calls that ran without one."""

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

#: Maximum number of failed keys that a cache remembers, so as not to retry them in every call.
_MAX_REFUSED = 1024


class GraphFallbackWarning(RuntimeWarning):
    """A call runs without the requested graph. Issued once per reason."""


@dataclass(frozen=True)
class GraphStatus:
    """Statistics of graphs.

    Attributes:
        graphs: Number of live graphs.
        nbytes: Bytes of their memory pools.
        captures, replays, evictions: Number of each.
        fallbacks: Number of calls that ran without a graph, by reason.
    """

    graphs: int = 0
    nbytes: int = 0
    captures: int = 0
    replays: int = 0
    evictions: int = 0
    fallbacks: dict[str, int] = field(default_factory=dict)


@dataclass(eq=False)
class _Pool:
    """Memory that several graphs share. It is freed only when the last of them is released."""

    handle: Any
    device: torch.device
    nbytes: int = 0
    graphs: int = 0


@dataclass(eq=False)
class Entry:
    """One captured graph, and a payload that its caller stores with it."""

    captured: Captured
    pool: _Pool
    payload: Any = None


class GraphCache:
    """A cache of graphs that evicts the least recently used.

    Graphs that share a memory pool reuse each other's temporaries, so they must never run concurrently: a
    cache runs one at a time (:attr:`lock`) and synchronises streams. The memory of a pool is freed only with
    the last of its graphs. A cache therefore opens a new pool when the newest exceeds a quarter of
    ``max_bytes``, and evicts complete pools, least recently used first, when their sum exceeds ``max_bytes``.

    Args:
        max_graphs: Maximum number of graphs.
        max_bytes: Maximum bytes of pool memory; None for no limit. A graph that needs more on its own is
            rejected. Static inputs and the driver's memory per graph do not count.
        capturer: Captures the graphs; CUDA graphs by default.
    """

    def __init__(
        self, max_graphs: int = 64, max_bytes: int | None = None, *, capturer: Capturer | None = None
    ) -> None:
        arguments.integer("max_graphs", max_graphs, 1)
        if max_bytes is not None:
            arguments.integer("max_bytes", max_bytes, 0)
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
        """Bytes of the memory pools."""
        return sum(pool.nbytes for pool in self._pools)

    def status(self) -> GraphStatus:
        """Return the statistics of this cache."""
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
        """Return the graph of ``key``, if any, and mark it as most recently used."""
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def refused(self, key: Hashable) -> str | None:
        """Return why an earlier attempt to capture ``key`` failed, or None."""
        return self._refused.get(key)

    def replay(self, entry: Entry) -> Any:
        """Replay a graph and return its outputs, which the next replay in this cache may overwrite."""
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
            CaptureError: If the function runs but cannot be captured; :meth:`refused` then returns the
                reason. Other graphs stay valid. Exceptions of ``function`` itself propagate.
        """
        with nested():
            while len(self._entries) >= self.max_graphs:
                self._evict(next(iter(self._entries)))
            entry = self._capture(key, function, device, warmup)
            if self._is_full() and not self._alone_too_large(entry):
                self._evict_other_pools(keep=entry.pool)
                if self._is_full():
                    # The newest pool is too large: a new pool shows how much this graph needs on its own.
                    self._evict_pool(entry.pool)
                    entry = self._capture(key, function, device, 0)
            if self._alone_too_large(entry):
                self._evict_pool(entry.pool)
                raise self._refuse(key, f"a graph needs more than the cache's {self.max_bytes} bytes")
        entry.payload = payload
        return entry

    def clear(self) -> None:
        """Release all graphs and their memory, and allow failed keys to be retried."""
        with self.lock:
            for pool in list(self._pools):
                self._evict_pool(pool)
            self._refused.clear()

    def fall_back(self, reason: str, *, warn: bool = True) -> None:
        """Count a call that runs without a graph, and warn if its reason is new in this process."""
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
            # The failed capture may have left allocations in the pool, so later graphs use another. It may
            # have failed for lack of memory, so free memory for the eager call.
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
        while len(self._refused) > _MAX_REFUSED:
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

    def _evict_other_pools(self, keep: _Pool) -> None:
        # Later entries overwrite earlier ones, which leaves the last use of each pool.
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
    """Run graphed functions eagerly inside the block, as parts of a graph that another one captures."""
    previous, _local.nested = is_nested(), True
    try:
        yield
    finally:
        _local.nested = previous


def is_nested() -> bool:
    """Whether this thread is inside :func:`nested`."""
    return getattr(_local, "nested", False)


def graph_status() -> GraphStatus:
    """Return the statistics of all graph caches of this process (of one cache: :meth:`GraphCache.status`)."""
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
