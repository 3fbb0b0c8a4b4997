"""Runs a case: checks every candidate against float64, then times the correct ones."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llm_trm.benchmark import limits as machine_limits
from llm_trm.benchmark.accuracy import broken_rules, errors, float64_truth
from llm_trm.benchmark.candidates import CANDIDATES, Candidate, build, unavailable
from llm_trm.benchmark.environment import device_name
from llm_trm.benchmark.models import State
from llm_trm.benchmark.protocol import MIN_ROUNDS, interleave, synchronize, timer_for
from llm_trm.benchmark.results import CaseResult, Row, add_speedups
from llm_trm.benchmark.steps import Inputs, Timed, make_inputs, make_state
from llm_trm.benchmark.suites import Group
from llm_trm.benchmark.workloads import Case
from llm_trm.memory import free_memory
from trm_kernels.testing import ErrorPool

#: Called with a description of the current activity.
Progress = Callable[[str], None]

#: Called with a row after it has been checked, and again after it has been timed.
OnRow = Callable[[Row], None]

#: Number of calls of each candidate before its timing, after which it is compiled, captured and warm.
_CALLS_BEFORE_TIMING = 2

#: Time to compile a training step relative to a forward case: 77 s and 26 s, without torch's caches, on a
#: busy 2-core machine.
_TRAIN_COMPILES = 3.0


#: Usable fraction of a device's free memory; the rest is lost to fragmentation and libraries.
_USABLE_MEMORY = 0.9


class DeviceLostError(RuntimeError):
    """A candidate made the device unusable for this process (an invalid memory access or failed launch).

    Attributes:
        case: Name of the case.
        backend: The candidate.
    """

    def __init__(self, case: Case, backend: str, error: Exception) -> None:
        super().__init__(f"{backend} broke the device on {case.name}: {_first_line(error)}")
        self.case = case
        self.backend = backend


@dataclass
class Budget:
    """Time budget of a whole run, and its estimate of compile times.

    Args:
        seconds: Wall-clock seconds from now.
        case_seconds: Maximum time of the timed rounds of one case, in seconds.
        compile_seconds: Expected time to compile a forward case; updated by measurements.
        clock: Clock in seconds; replaced in tests.
    """

    seconds: float
    case_seconds: float
    compile_seconds: float = 15.0
    clock: Callable[[], float] = time.perf_counter
    start: float = field(init=False)

    def __post_init__(self) -> None:
        self.start = self.clock()

    @property
    def left(self) -> float:
        """Remaining seconds; negative if the budget is exceeded."""
        return self.seconds - (self.clock() - self.start)

    def refuses(self, cost: float) -> str | None:
        """The reason to skip work that takes about ``cost`` seconds, or None if there is time."""
        if cost <= self.left:
            return None
        return (
            f"takes about {cost:.2g} s, and {max(self.left, 0):.0f} s of --budget {self.seconds:.0f} are left"
        )


@dataclass
class _Measured:
    """A candidate with a correct result, ready for timing."""

    step: Timed
    row: Row
    flops: int
    seconds: float


class CaseRun:
    """One case with the state that its candidates share."""

    def __init__(
        self,
        case: Case,
        device: torch.device,
        budget: Budget,
        progress: Progress,
        seed: int,
        excluded: Mapping[str, str],
        group: Group,
        on_row: OnRow = lambda _: None,
        early_seconds: float = 0.0,
    ) -> None:
        self.on_row = on_row
        self.early_seconds = early_seconds
        self.group = group
        self.seed = seed
        self.excluded = excluded
        self.case = case
        self.device = device
        self.dtype: torch.dtype = getattr(torch, case.dtype)
        self.budget = budget
        self.progress = progress
        self.limits = machine_limits.measure(device, self.dtype)
        self.floor = self.limits.floor(case)
        self.eager_seconds = 1.25 * self.floor  # estimate until eager has run; wide networks come close
        self.committed = 0.0
        self.eager_errors: dict[str, ErrorPool] = {}
        self.measured: list[_Measured] = []
        self.rows: dict[str, Row] = {}

    def run(self, names: Sequence[str]) -> CaseResult:
        """Measure the candidates, and return one row for each in the order of ``names``."""
        # float64 takes about twice as long as eager, plus eager's own calls before and during timing.
        reason = self.budget.refuses((2 + _CALLS_BEFORE_TIMING + MIN_ROUNDS) * self.eager_seconds)
        if reason is not None:
            return self._result([self._absent(name) or Row(name, "skipped", reason) for name in names])
        # Without a reset, torch.compile would use dynamic shapes for the second shape of a run.
        torch.compiler.reset()
        torch.manual_seed(self.seed)
        state = make_state(self.case, self.device)
        inputs = make_inputs(self.case, self.device, self.limits.cache_bytes)
        self.progress("float64")
        truth = float64_truth(self.case, state, inputs)
        # Eager always runs first, because the tolerance rule is relative to its error.
        eager = self._prepare("eager", state, inputs, truth)
        self.eager_status = eager.status
        self._add(eager)
        early = self.early_seconds > 0.0
        for name in sorted(names, key=_preparation_order):
            if early and CANDIDATES[name].compiles > 0.0:
                early = False
                self._time(names, self.early_seconds)
            if name in self.excluded:
                self._add(Row(name, "failed", self.excluded[name]))
            elif name != "eager":
                self._add(self._prepare(name, state, inputs, truth))
        del truth
        self._time(names, self.budget.case_seconds)
        return self._result([self.rows[name] for name in names])

    def _add(self, row: Row) -> None:
        self.rows[row.backend] = row
        self.on_row(row)

    def _result(self, rows: list[Row]) -> CaseResult:
        add_speedups(rows)
        return CaseResult(
            self.case,
            device_name(self.device),
            floor_ms=self.floor * 1e3,
            matmul_tflops=self.limits.flops * 1e-12,
            copy_gbps=self.limits.bandwidth * 1e-9,
            rows=rows,
            group=self.group,
        )

    def _absent(self, name: str) -> Row | None:
        reason = unavailable(name, self.device.type)
        return None if reason is None else Row(name, "not run", reason)

    def _prepare(self, name: str, state: State, inputs: Inputs, truth: dict[str, Tensor]) -> Row:
        """Compile, check and warm one candidate, and add it to ``measured`` if it should be timed."""
        if name != "eager" and not self.eager_errors:
            return self._absent(name) or Row(
                name, self.eager_status, "eager, the reference for all candidates, did not run"
            )
        self.progress(name)
        candidate = CANDIDATES[name]
        graphs = candidate.compiles * (1.0 if self.case.mode == "forward" else _TRAIN_COMPILES)
        try:
            reason = self._lacks_memory(candidate)
            if reason is not None:
                return Row(name, "not run", reason)
            step = build(name, self.case, state, inputs)
            if isinstance(step, str):
                return Row(name, "not run", step)
            cost = (_CALLS_BEFORE_TIMING + MIN_ROUNDS) * self.eager_seconds
            cost += self.budget.compile_seconds * graphs
            reason = self.budget.refuses(self.committed + cost)
            if reason is not None:
                return Row(name, "skipped", reason)
            first = self._timed(step.prepare)
            step.check()
            row, flops = self._checked(candidate, step, truth)
            peak: list[int | None] = []
            seconds = self._timed(lambda: peak.append(step.peak_memory(self.device)))
            row.peak_bytes = peak[0]
            if row.status == "ok":
                self.measured.append(_Measured(step, row, flops, self._warm_seconds(step, seconds)))
        except Exception as error:  # a candidate's failure is a result and must not affect the others
            self._require_device(name, error)
            return Row(name, "failed", _first_line(error))
        if name == "eager":
            self.eager_seconds = seconds
        if candidate.compiles == 1.0 and not candidate.graph:  # a graph reuses what is compiled already
            self.budget.compile_seconds = max(first - seconds, 1.0) / graphs
        self.committed += MIN_ROUNDS * seconds
        return row

    def _lacks_memory(self, candidate: Candidate) -> str | None:
        """The reason why a graph, which keeps its memory, would leave too little for plain calls, or None."""
        free = free_memory(self.device)
        if not candidate.graph or free is None:
            return None
        peaks = {name: row.peak_bytes for name, row in self.rows.items() if row.peak_bytes is not None}
        own = peaks.get(candidate.base, peaks["eager"])
        plain = max(peak for name, peak in peaks.items() if not CANDIDATES[name].graph)
        if own + plain <= _USABLE_MEMORY * free:
            return None
        return (
            f"a graph would keep about {own / 2**30:.0f} GiB, the largest plain candidate needs "
            f"{plain / 2**30:.0f} GiB, and only {free / 2**30:.0f} GiB are free"
        )

    def _checked(self, candidate: Candidate, step: Timed, truth: dict[str, Tensor]) -> tuple[Row, int]:
        """The row of a candidate whose results were just computed, and the operations per call."""
        if candidate.differs is not None:
            row = Row(candidate.name, "ok", differs=candidate.differs)
            if not all(bool(tensor.isfinite().all()) for _, tensor in step.results()):
                row.status, row.reason = "wrong", "a result is not finite"
            assert step.model.call_flops is not None
            row.flops = self.case.in_all_calls(step.model.call_flops)
            return row, row.flops
        pools = errors(step.results(), truth)
        if candidate.name == "eager":
            self.eager_errors = pools
        broken = broken_rules(self.dtype, pools, self.eager_errors)
        if candidate.coarser is not None and all(math.isfinite(pool.error) for pool in pools.values()):
            row = Row(candidate.name, "ok", coarser=candidate.coarser)
        else:
            row = Row(candidate.name, "wrong" if broken else "ok", "; ".join(broken) or None)
        row.errors = {key: e if math.isfinite(e := pool.error) else None for key, pool in pools.items()}
        return row, self.case.flops

    def _warm_seconds(self, step: Timed, seconds: float) -> float:
        # Measuring memory slows a call down. This is negligible for a slow call; repeat a quick one.
        return seconds if seconds > 0.5 else self._timed(lambda: step(0))

    def _require_device(self, name: str, error: Exception) -> None:
        """Raise DeviceLostError, blaming ``name``, if the device no longer works."""
        try:
            synchronize(self.device)
        except Exception:
            raise DeviceLostError(self.case, name, error) from error

    def _timed(self, call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        synchronize(self.device)
        return time.perf_counter() - start

    def _time(self, names: Sequence[str], seconds: float) -> None:
        """Time those of ``names`` that are ready in interleaved rounds for ``seconds``."""
        ready = {one.row.backend: one for one in self.measured if one.row.status == "ok"}
        measured = {name: ready[name] for name in names if name in ready}
        if not measured:
            return
        self.progress("timing " + ", ".join(measured))
        timings, failures = interleave(
            {name: candidate.step for name, candidate in measured.items()},
            timer_for(self.device),
            {name: candidate.seconds for name, candidate in measured.items()},
            min(seconds, self.budget.left),
        )
        for name, error in failures.items():
            self._require_device(name, error)
            measured[name].row.status, measured[name].row.reason = "failed", _first_line(error)
        for name, timing in timings.items():
            row = measured[name].row
            row.median_ms, row.p20_ms, row.p80_ms = (t * 1e3 for t in (timing.median, timing.p20, timing.p80))
            row.rounds = len(timing.samples)
            row.tflops = measured[name].flops / timing.median * 1e-12
            if row.differs is None:
                row.share = self.floor / timing.median
            self.on_row(row)


def _preparation_order(name: str) -> tuple[float, bool]:
    # Candidates that compile longest come last, so that an interruption costs one row. Graphs of baselines
    # come after the library's, so that these get the memory if it is short.
    candidate = CANDIDATES[name]
    return candidate.compiles, candidate.graph and not candidate.trains


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def run_case(
    case: Case,
    device: torch.device,
    names: Sequence[str],
    budget: Budget,
    progress: Progress = lambda _: None,
    *,
    seed: int = 0,
    excluded: Mapping[str, str] | None = None,
    group: Group = "main",
    on_row: OnRow = lambda _: None,
    early_seconds: float = 0.0,
) -> CaseResult:
    """Measure candidates on a case; those that cannot run get a row with the reason.

    Args:
        case: The case.
        device: The device.
        names: The candidates, in the order of the rows.
        budget: Time budget, shared by the cases of a run.
        progress: Called with a description of the current activity.
        seed: Seed of weights and inputs.
        excluded: Candidates that are known to break the device on this case, with the reason.
        group: Group of the result.
        on_row: Called with each row as it becomes available, before the case is complete.
        early_seconds: Duration of timed rounds before the first candidate compiles, so that an interrupted
            run has at least these.

    Raises:
        DeviceLostError: A candidate made the device unusable for this process.
    """
    run = CaseRun(case, device, budget, progress, seed, excluded or {}, group, on_row, early_seconds)
    return run.run(names)
