"""Measures the peak memory of a call with PyTorch's allocators."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd.profiler import profile


def peak_memory(device: torch.device, call: Callable[[], object]) -> int | None:
    """Peak memory of ``call`` in bytes above the memory in use before; None if it cannot be measured.

    On CUDA it comes from the caching allocator's statistics. On CPUs it comes from the profiler, which
    reports every allocation and release of PyTorch's CPU allocator. This covers compiled code, but not the
    scratch space of oneDNN and OpenMP.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        call()
        return None
    # Use the legacy recorder, because a kineto session takes 100 ms to start and stop.
    with profile(use_cpu=True, profile_memory=True, use_kineto=False) as recorded:
        call()
    assert recorded.kineto_results is not None
    held = peak = 0
    for event in sorted(recorded.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
