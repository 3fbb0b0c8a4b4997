"""Runs a case: checks every candidate against float64, then times those that are right."""

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

#: Told what is being done now.
Progress = Callable[[str], None]

#: Told of a row when it was checked, and again when it was timed.
OnRow = Callable[[Row], None]

#: Called with a candidate before its timing: one that compiles or captures is no longer cold then.
_CALLS_BEFORE_TIMING = 2

#: Time to compile a training step over that of a forward case: 77 s and 26 s, without torch's caches, on a
#: busy 2-core machine.
_TRAIN_COMPILES = 3.0


#: Of what is free on a device; the rest is lost to fragments and to libraries.
_USABLE_MEMORY = 0.9


class DeviceLostError(RuntimeError):
    """A candidate left the device unusable for this process (a bad memory access, a failed launch).

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
    """Time that a whole run may take, and what it has learnt about the time that things take.

    Args:
        seconds: Wall-clock seconds from now.
        case_seconds: Seconds that the timed rounds of one case may take.
        compile_seconds: What compiling a forward case is expected to take; follows what is seen.
        clock: Seconds; replaced in tests.
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
        """Seconds left; negative when overdrawn."""
        return self.seconds - (self.clock() - self.start)

    def refuses(self, cost: float) -> str | None:
        """Why something that takes about ``cost`` seconds is skipped, or None if there is time."""
        if cost <= self.left:
            return None
        return (
            f"takes about {cost:.2g} s, and {max(self.left, 0):.0f} s of --budget {self.seconds:.0f} are left"
        )


@dataclass
class _Measured:
    """A candidate that gave the right result, ready for timing."""

    step: Timed
    row: Row
    flops: int
    seconds: float


class CaseRun:
    """Everything of one case that its candidates share."""

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
        self.eager_seconds = 1.25 * self.floor  # until it has run; wide networks come that near
        self.committed = 0.0
        self.eager_errors: dict[str, ErrorPool] = {}
        self.measured: list[_Measured] = []
        self.rows: dict[str, Row] = {}

    def run(self, names: Sequence[str]) -> CaseResult:
        """Measure the candidates, and return one row for each in the order of ``names``."""
        # float64 takes about twice as long as eager, which itself is called until it is timed.
        reason = self.budget.refuses((2 + _CALLS_BEFORE_TIMING + MIN_ROUNDS) * self.eager_seconds)
        if reason is not None:
            return self._result([self._absent(name) or Row(name, "skipped", reason) for name in names])
        # Without a reset torch.compile would meet the second shape of a run with dynamic shapes.
        torch.compiler.reset()
        torch.manual_seed(self.seed)
        state = make_state(self.case, self.device)
        inputs = make_inputs(self.case, self.device, self.limits.cache_bytes)
        self.progress("float64")
        truth = float64_truth(self.case, state, inputs)
        # Eager goes first, asked for or not: the tolerance rule is stated in its error.
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
        """Compile, check and warm one candidate; keeps it in ``measured`` if it is to be timed."""
        if name != "eager" and not self.eager_errors:
            return self._absent(name) or Row(
                name, self.eager_status, "eager, which all are held to, did not run"
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
        except Exception as error:  # a candidate's failure is a result, and no reason to lose the others
            self._require_device(name, error)
            return Row(name, "failed", _first_line(error))
        if name == "eager":
            self.eager_seconds = seconds
        if candidate.compiles == 1.0 and not candidate.graph:  # a graph finds what was compiled before it
            self.budget.compile_seconds = max(first - seconds, 1.0) / graphs
        self.committed += MIN_ROUNDS * seconds
        return row

    def _lacks_memory(self, candidate: Candidate) -> str | None:
        """Why a graph, which keeps its memory between replays, would leave too little for the plain calls."""
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
            f"{plain / 2**30:.0f}, and {free / 2**30:.0f} are free"
        )

    def _checked(self, candidate: Candidate, step: Timed, truth: dict[str, Tensor]) -> tuple[Row, int]:
        """The row of a candidate whose results were just computed, and the operations of one call."""
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
        # The call that counted memory was slowed by counting; a slow one hides that, a quick one is repeated.
        return seconds if seconds > 0.5 else self._timed(lambda: step(0))

    def _require_device(self, name: str, error: Exception) -> None:
        """Raise DeviceLostError if nothing works on the device any more, for which ``name`` is to blame."""
        try:
            synchronize(self.device)
        except Exception:
            raise DeviceLostError(self.case, name, error) from error

    def _timed(self, call: Callable[[], object]) -> float:
        begin = time.perf_counter()
        call()
        synchronize(self.device)
        return time.perf_counter() - begin

    def _time(self, names: Sequence[str], seconds: float) -> None:
        """Time those of ``names`` that are ready, in turn; ``seconds``: of rounds."""
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
    # What compiles longest comes last: a cut then costs one row. Graphs of the baselines come after the
    # library's own: where memory is short, they go without.
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
    """Measure candidates on a case; those that cannot run get a row that says why.

    Args:
        case: What to run.
        device: Where.
        names: The candidates, in the order of the rows.
        budget: Time that may be taken, shared by the cases of a run.
        progress: Told what is being done.
        seed: Of weights and inputs.
        excluded: Candidates that are known to break the device on this case, with the reason.
        group: What the result is filed under.
        on_row: Told of each row as it comes, before the case is whole.
        early_seconds: Of timed rounds before the first candidate compiles: a run that is cut then has those.

    Raises:
        DeviceLostError: A candidate left the device unusable for this process.
    """
    run = CaseRun(case, device, budget, progress, seed, excluded or {}, group, on_row, early_seconds)
    return run.run(names)
