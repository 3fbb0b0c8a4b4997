"""The timing protocol: candidates interleaved in rounds within one process; medians with p20 and p80.

A machine's speed varies during a measurement (clocks, heat, other processes). Interleaved candidates are all
affected in the same way; candidates timed one after the other are not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

#: A timed unit of work; the argument is a counter that selects the input set.
Call = Callable[[int], object]

#: ``timer(call, first, count)``: seconds per call, over ``call(first) ... call(first + count - 1)``.
Timer = Callable[[Call, int, int], float]

MIN_ROUNDS = 3
MAX_ROUNDS = 200

#: A sample repeats its call for about this long, so that clock and launch jitter are negligible.
SAMPLE_SECONDS = 2e-3
MAX_CALLS = 200


@dataclass(frozen=True)
class Timing:
    """Samples of one candidate, in seconds per call."""

    samples: tuple[float, ...]

    def quantile(self, q: float) -> float:
        """The q-quantile, linearly interpolated."""
        ordered = sorted(self.samples)
        position = q * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])

    @property
    def median(self) -> float:
        """Median in seconds."""
        return self.quantile(0.5)

    @property
    def p20(self) -> float:
        """20th percentile in seconds."""
        return self.quantile(0.2)

    @property
    def p80(self) -> float:
        """80th percentile in seconds."""
        return self.quantile(0.8)


def interleave(
    calls: Mapping[str, Call],
    timer: Timer,
    expected: Mapping[str, float],
    budget: float,
    *,
    clock: Callable[[], float] = time.perf_counter,
    max_rounds: int = MAX_ROUNDS,
) -> tuple[dict[str, Timing], dict[str, Exception]]:
    """Time every candidate once per round, rotating the order, until the budget is spent.

    Args:
        calls: Candidates, each already called, so that it is compiled and warm.
        timer: Function that takes one sample.
        expected: Time of one warm call of each candidate in seconds, which determines the calls per sample.
        budget: Time in seconds after which no new round starts, except for the first ``MIN_ROUNDS``.
        clock: Clock in seconds; replaced in tests.
        max_rounds: Maximum number of rounds.

    Returns:
        The timings, and the exceptions of candidates that failed, which have no timing.
    """
    counts = {
        name: min(MAX_CALLS, max(1, round(SAMPLE_SECONDS / max(expected[name], 1e-9)))) for name in calls
    }
    samples: dict[str, list[float]] = {name: [] for name in calls}
    failures: dict[str, Exception] = {}
    index = 0

    def one_round(first: int, *, keep: bool) -> None:
        nonlocal index
        names = [name for name in calls if name not in failures]
        for position in range(len(names)):
            name = names[(first + position) % len(names)]
            try:
                seconds = timer(calls[name], index, counts[name])
            except Exception as error:
                failures[name] = error
                continue
            if keep:
                samples[name].append(seconds)
            index += counts[name]

    start = clock()
    # Discard one round to warm up, unless it would take much of the budget: slow candidates are warm already.
    if sum(counts[name] * expected[name] for name in calls) * 10 < budget:
        one_round(0, keep=False)
    for done in range(max_rounds):
        if len(failures) == len(calls) or (done >= MIN_ROUNDS and clock() - start >= budget):
            break
        one_round(done, keep=True)
    timings = {name: Timing(tuple(taken)) for name, taken in samples.items() if name not in failures}
    return timings, failures


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _cuda_timer(call: Call, first: int, count: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    # Start with an idle device, because queued work of the previous candidate would hide launch overhead.
    torch.cuda.synchronize()
    begin.record()
    for i in range(first, first + count):
        call(i)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3 / count


def timer_for(device: torch.device) -> Timer:
    """A timer with CUDA events on CUDA, and with a wall clock around synchronised calls elsewhere."""
    if device.type == "cuda":
        return _cuda_timer

    def wall_timer(call: Call, first: int, count: int) -> float:
        synchronize(device)
        begin = time.perf_counter()
        for i in range(first, first + count):
            call(i)
        synchronize(device)
        return (time.perf_counter() - begin) / count

    return wall_timer
