"""What the machine can do: one big matrix product and one big copy, timed in the same run."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import torch

from llm_trm.benchmark.protocol import Call, timer_for
from llm_trm.benchmark.workloads import Case

#: Assumed where the operating system does not tell the size of the last-level cache.
_ASSUMED_CACHE = 32 * 2**20


@dataclass(frozen=True)
class Limits:
    """Measured rates of one device in one dtype.

    Attributes:
        flops: Operations a second of a square matrix product, at PyTorch's default precision settings.
        bandwidth: Bytes a second of a copy, reads and writes both counted.
        cache_bytes: Size of the last-level cache.
    """

    flops: float
    bandwidth: float
    cache_bytes: int

    def floor(self, case: Case) -> float:
        """Seconds below which the case cannot go: the longer of its arithmetic and its traffic."""
        return max(case.flops / self.flops, case.bytes_moved(self.cache_bytes) / self.bandwidth)


def _fastest(call: Call, device: torch.device, samples: int = 10) -> float:
    timer = timer_for(device)
    timer(call, 0, 2)
    # The fastest, not the median: a limit that noise has lowered would flatter every candidate.
    return min(timer(call, i, 1) for i in range(samples))


def cache_bytes(device: torch.device) -> int:
    """Bytes of the last-level cache of a device."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    try:
        return os.sysconf("SC_LEVEL3_CACHE_SIZE") or _ASSUMED_CACHE
    except (ValueError, OSError, AttributeError):  # not glibc
        return _ASSUMED_CACHE


@functools.cache
def measure(device: torch.device, dtype: torch.dtype) -> Limits:
    """Measure the limits of a device, once a process for each dtype."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    c = torch.empty_like(a)
    product = _fastest(lambda _: torch.mm(a, b, out=c), device)
    elements = (2**30 if device.type == "cuda" else 2**27) // dtype.itemsize
    source = torch.randn(elements, device=device, dtype=dtype)
    target = torch.empty_like(source)
    copy = _fastest(lambda _: target.copy_(source), device)
    moved = 2 * elements * dtype.itemsize
    return Limits(2 * n**3 / product, moved / copy, cache_bytes(device))
