"""How time is taken: candidates interleaved round by round in one process, medians with p20 and p80.

A machine changes speed while it is measured (clocks, heat, neighbours). Candidates that take turns share
those changes; candidates timed one after the other do not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

#: A timed unit of work; the argument counts up and picks the input set.
Call = Callable[[int], object]

#: ``timer(call, first, count)``: seconds a call, over ``call(first) ... call(first + count - 1)``.
Timer = Callable[[Call, int, int], float]

MIN_ROUNDS = 3
MAX_ROUNDS = 200

#: A sample repeats its call until it lasts about this long, so that clock and launch jitter are small.
SAMPLE_SECONDS = 2e-3
MAX_CALLS = 200


@dataclass(frozen=True)
class Timing:
    """Samples of one candidate, in seconds a call."""

    samples: tuple[float, ...]

    def quantile(self, q: float) -> float:
        """The q-quantile, linear between samples."""
        ordered = sorted(self.samples)
        position = q * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])

    @property
    def median(self) -> float:
        """Median, in seconds."""
        return self.quantile(0.5)

    @property
    def p20(self) -> float:
        """20% of the samples were at most this long, in seconds."""
        return self.quantile(0.2)

    @property
    def p80(self) -> float:
        """80% of the samples were at most this long, in seconds."""
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
    """Time every candidate once a round, the first place rotating, until the budget is spent.

    Args:
        calls: Candidates, each called before so that it is compiled and warm.
        timer: Takes one sample.
        expected: Seconds that one warm call of each candidate took; sets the calls in a sample.
        budget: Seconds after which no round is begun, ``MIN_ROUNDS`` rounds excepted.
        clock: Seconds; replaced in tests.
        max_rounds: Rounds after which to stop though time is left.

    Returns:
        The timings, and the exceptions of candidates that failed (those have no timing).
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
    # Slow candidates were warmed by the calls before; for quick ones a discarded round costs nothing.
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
    # From an idle device: work queued by the previous candidate would hide this one's launches.
    torch.cuda.synchronize()
    begin.record()
    for i in range(first, first + count):
        call(i)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3 / count


def timer_for(device: torch.device) -> Timer:
    """CUDA events on CUDA, a wall clock around synchronised calls elsewhere."""
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
