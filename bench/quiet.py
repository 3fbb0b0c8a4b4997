"""Detects noise on a CPU with a short burst of arithmetic before and after every sample.

Another process on the same cores, or a lower clock, slows the bursts as much as the sample. A sample is kept
if both bursts run near the rate that the same case's bursts reach. The comparison is within a case, because
the clock of a virtual machine may stay low for minutes, which affects all candidates of the case.

A burst is the native module's micro-kernel. Multiply-adds in registers would not detect a process on the
other thread of a core, because they leave enough resources for it (Zen 3: 99 to 103 GF/s, while products fell
from 98 to 67).
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType

import torch

from llm_trm.benchmark.protocol import Call, Timer

#: Minimum rate of a sample's bursts, relative to the rate that the case's bursts reach.
QUIET = 0.9
#: Quantile of a case's bursts that defines the reached rate. The maximum is unsuitable: a clock that rose for
#: 2 ms (153 GF/s, compared to 132 over 50 ms) led to 349 of 350 samples being dropped.
REACHED = 0.95
BURST_SECONDS = 2e-3

#: Number of bursts of multiply-adds to measure the peak. Noise would interrupt every longer burst.
_PEAK_BURSTS = 100

#: Without the native module, a burst is this many products of two matrices of this size. It takes 2 to 5 ms,
#: and the 0.8 MB of the matrices stay in the second-level cache.
_PRODUCTS, _SIZE = 16, 256


class Sample(float):
    """Seconds per call, with the rate of the slower of the two bursts around it in GF/s."""

    burst: float

    def __new__(cls, seconds: float, burst: float) -> Sample:
        sample = super().__new__(cls, seconds)
        sample.burst = burst
        return sample


def native_module() -> ModuleType | None:
    """``trm_kernels._native``, or None if it is not built."""
    try:
        return importlib.import_module("trm_kernels._native")
    except ImportError:
        return None


class Bursts:
    """Bursts on a number of threads.

    Attributes:
        kind: ``"tile"``: the native module's micro-kernel. ``"mm"``: products of small matrices by torch,
            which must be set to the same number of threads.
        rates: Rates of the bursts since :meth:`begin`, in GF/s.
        peak: The measured FMA peak in GF/s, or None without the native module.
    """

    def __init__(self, threads: int, native: ModuleType | None) -> None:
        self.threads = threads
        self.rates: list[float] = []
        self.peak: float | None = None
        self._native = native
        self.kind = "mm" if native is None else "tile"
        self._matrices = torch.randn(2, _SIZE, _SIZE)
        self._product = torch.empty(_SIZE, _SIZE)

    def begin(self) -> None:
        """Start a case, whose samples are compared with its own bursts."""
        self.rates = []

    def burst(self) -> float:
        """Run one burst and return its rate in GF/s."""
        rate = self._products() if self._native is None else self._rate(self._native.tile_rate)
        self.rates.append(rate)
        return rate

    def reached(self) -> float:
        """The rate in GF/s that one in twenty of the case's bursts exceeds; 0 before the first."""
        return _reached(self.rates)

    def measure_peak(self) -> float | None:
        """Measure the FMA peak, and keep the best of all calls in ``peak``."""
        if self._native is not None:
            rates = [self._rate(self._native.fma_peak) for _ in range(_PEAK_BURSTS)]
            self.peak = max(self.peak or 0.0, _reached(rates))
        return self.peak

    def timer(self, timer: Timer) -> Timer:
        """Wrap ``timer`` in two bursts; its samples are :class:`Sample`."""

        def timed(call: Call, first: int, count: int) -> float:
            before = self.burst()
            seconds = timer(call, first, count)
            return Sample(seconds, min(before, self.burst()))

        return timed

    def quiet(self, samples: Iterable[Sample]) -> list[Sample]:
        """The samples whose bursts have at least 0.9 of the rate that the case's bursts reach."""
        least = QUIET * self.reached()
        return [sample for sample in samples if sample.burst >= least]

    def _rate(self, work: Callable[[float, int, str], float]) -> float:
        assert self._native is not None
        # The machine's best instruction set, independent of TRM_NATIVE_ISA.
        return work(BURST_SECONDS, self.threads, self._native.instruction_sets()[0])

    def _products(self) -> float:
        def multiply() -> None:
            torch.mm(*self._matrices, out=self._product)

        with torch.no_grad():
            multiply()  # loads the matrices into the cache again, since a sample may have evicted them
            start = time.perf_counter()
            for _ in range(_PRODUCTS):
                multiply()
            seconds = time.perf_counter() - start
        return _PRODUCTS * 2 * _SIZE**3 / seconds * 1e-9


def _reached(rates: Sequence[float]) -> float:
    ranked = sorted(rates)
    return ranked[math.ceil(REACHED * len(ranked)) - 1] if ranked else 0.0


def record(native: ModuleType | None) -> dict[str, str | None]:
    """Instruction sets of the peak and of the native kernels for a results file; None without the module."""
    return {
        "peak": None if native is None else native.instruction_sets()[0],
        "native": None if native is None else native.default_instruction_set(),
    }
