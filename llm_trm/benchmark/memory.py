"""Peak memory of a call, from PyTorch's allocators."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd.profiler import profile


def peak_memory(device: torch.device, call: Callable[[], object]) -> int | None:
    """Bytes that ``call`` holds at its peak, above what was held before; None where nothing counts them.

    On CUDA from the caching allocator's statistics. On CPUs from the profiler, which reports every
    allocation and release of PyTorch's CPU allocator: compiled code is covered, the scratch space that
    oneDNN and OpenMP take for themselves is not.
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
    # The legacy recorder: kineto's own sessions take 100 ms to start and stop.
    with profile(use_cpu=True, profile_memory=True, use_kineto=False) as recorded:
        call()
    assert recorded.kineto_results is not None
    held = peak = 0
    for event in sorted(recorded.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
