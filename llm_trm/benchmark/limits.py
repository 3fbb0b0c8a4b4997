"""Measures the machine's limits with one large matrix product and one large copy in the same run."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import torch

from llm_trm.benchmark.protocol import Call, timer_for
from llm_trm.benchmark.workloads import Case

#: Assumed size of the last-level cache if the operating system does not report it.
_ASSUMED_CACHE = 32 * 2**20


@dataclass(frozen=True)
class Limits:
    """Measured rates of one device in one dtype.

    Attributes:
        flops: Operations per second of a square matrix product, at PyTorch's default precision settings.
        bandwidth: Bytes per second of a copy, counting both reads and writes.
        cache_bytes: Size of the last-level cache.
    """

    flops: float
    bandwidth: float
    cache_bytes: int

    def floor(self, case: Case) -> float:
        """Lower bound of the case's time in seconds: the maximum of its compute and memory time."""
        return max(case.flops / self.flops, case.bytes_moved(self.cache_bytes) / self.bandwidth)


def _fastest(call: Call, device: torch.device, samples: int = 10) -> float:
    timer = timer_for(device)
    timer(call, 0, 2)
    # Use the fastest sample, not the median, because a limit lowered by noise would flatter all candidates.
    return min(timer(call, i, 1) for i in range(samples))


def cache_bytes(device: torch.device) -> int:
    """Size of a device's last-level cache in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    try:
        return os.sysconf("SC_LEVEL3_CACHE_SIZE") or _ASSUMED_CACHE
    except (ValueError, OSError, AttributeError):  # not glibc
        return _ASSUMED_CACHE


@functools.cache
def measure(device: torch.device, dtype: torch.dtype) -> Limits:
    """Measure the limits of a device, once per process and dtype."""
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
