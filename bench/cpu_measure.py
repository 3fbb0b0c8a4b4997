"""Runs one case of ``bench/cpu.py``: checks every candidate against float64, and times the correct ones."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.cpu_candidates import CANDIDATES, EAGER, ORIGINAL, build, written_out
from bench.cpu_cases import CpuCase
from bench.quiet import Bursts, Sample
from llm_trm.benchmark.accuracy import broken_rules, errors
from llm_trm.benchmark.environment import cpu_name
from llm_trm.benchmark.models import State, reference_network
from llm_trm.benchmark.protocol import MIN_ROUNDS, Timing, interleave, timer_for
from llm_trm.benchmark.steps import Inputs, Step, make_inputs, make_state
from trm_kernels.testing import ErrorPool

CPU = torch.device("cpu")

#: Baselines of ratios, if they were timed.
BASELINES = (EAGER, ORIGINAL)

#: Minimum number of quiet samples for a median.
MIN_QUIET = MIN_ROUNDS
#: Maximum ratio of the 80th to the 20th percentile. Above it, the noise check has missed something.
MAX_SPREAD = 1.5
#: Maximum number of times to repeat the timed rounds until every candidate has enough quiet samples.
_MAX_ATTEMPTS = 3


@dataclass
class Row:
    """Result of one candidate on one number of threads. Unmeasured or withheld values are None.

    Attributes:
        status: ``ok``, ``wrong`` (violates the tolerance rule), ``noisy`` (too few quiet samples, or too
            much spread), ``not run`` (does not support the case) or ``failed`` (raised an error).
        reason: Why the status is not ``ok``.
        median_ms, p20_ms, p80_ms: Milliseconds per call.
        samples: Number of quiet samples.
        dropped: Number of samples with a slow burst.
        fastest_ms: Milliseconds of the fastest call, including dropped ones, since noise only adds time.
        gflops: 1e9 operations on valid rows per second.
        share: Fraction of the measured FMA peak.
        ratio: Median of each baseline divided by this row's median.
        scaling: Median on one thread divided by this row's median, if both were timed in this run.
        errors: Relative Frobenius error against float64 of ``output`` and, in training, ``gradients``; None
            if it is not finite.
    """

    candidate: str
    status: str = "ok"
    reason: str | None = None
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    samples: int = 0
    dropped: int = 0
    fastest_ms: float | None = None
    gflops: float | None = None
    share: float | None = None
    ratio: dict[str, float] = field(default_factory=dict)
    scaling: float | None = None
    errors: dict[str, float | None] = field(default_factory=dict)


@dataclass
class _Setup:
    """State that all candidates of a case share."""

    work: CpuCase
    state: State
    inputs: Inputs
    mask: Tensor | None
    truth: dict[str, Tensor]

    @classmethod
    def of(cls, work: CpuCase) -> _Setup:
        torch.manual_seed(work.seed)
        state, inputs, mask = make_state(work.case, CPU), make_inputs(work.case, CPU, 0), work.mask()
        if mask is not None:
            inputs.grad_y.mul_(mask[..., None])  # ignore what the original computes at padding
        return cls(work, state, inputs, mask, _truth(work, state, inputs, mask))


def _truth(work: CpuCase, state: State, inputs: Inputs, mask: Tensor | None) -> dict[str, Tensor]:
    """Output and gradients of the reference in float64, by the names of :meth:`Step.results`."""
    x, y, z = (tensor.double() for tensor in inputs[0])
    model = written_out(reference_network)(
        work, {name: tensor.double() for name, tensor in state.items()}, mask
    )
    step = Step(work.case, model, Inputs([x], [y], [z], inputs.grad_y.double(), inputs.labels, inputs.head))
    step(0)
    return dict(step.results())


def _results(name: str, step: Step, mask: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    for key, tensor in step.results():
        # The original returns computed values at padding; all others must return zeros.
        hidden = name == ORIGINAL and key == "output" and mask is not None
        yield key, tensor.masked_fill(~mask[..., None], 0.0) if hidden and mask is not None else tensor


@dataclass
class _Ready:
    """A candidate with a correct result, and the seconds of a warm call."""

    row: Row
    step: Step
    seconds: float


def run_case(
    work: CpuCase,
    machine: Mapping[int, Bursts],
    names: Sequence[str],
    seconds: float,
    progress: Callable[[str], object] = lambda _: None,
) -> dict[str, Any]:
    """Check every candidate and time the correct ones on each number of threads.

    Args:
        machine: Bursts by number of threads, which the cases of a run share.
        names: Candidates in the order of the rows. ``eager`` always runs, because the tolerance rule is
            relative to its error.
        seconds: Duration of timed rounds on each number of threads; there are at least three rounds.
        progress: Called with a description of each activity.

    Returns:
        A line for a results file, without metadata of the run.
    """
    progress("float64")
    torch.set_num_threads(max(machine))
    setup = _Setup.of(work)
    rows: dict[int, list[Row]] = {}
    for threads, bursts in machine.items():
        torch.set_num_threads(threads)
        bursts.begin()
        bursts.measure_peak()
        rows[threads] = _measure(setup, bursts, names, seconds, progress)
    _add_scaling(rows)
    return {
        "name": work.name,
        "case": work.case.to_json(),
        "ragged": work.ragged,
        "lengths": work.lengths(),
        "padding": work.padding,
        "gflop": work.flops * 1e-9,
        "device": cpu_name(),
        "measurements": [
            {
                "threads": threads,
                "fma_peak_gflops": machine[threads].peak,
                "burst_gflops": machine[threads].reached(),
                "burst": machine[threads].kind,
                "measured": [asdict(row) for row in measured],
            }
            for threads, measured in rows.items()
        ],
    }


def _measure(
    setup: _Setup, bursts: Bursts, names: Sequence[str], seconds: float, progress: Callable[[str], object]
) -> list[Row]:
    # Without a reset, torch.compile would use dynamic shapes for the second shape of a run.
    torch.compiler.reset()
    ready: dict[str, _Ready] = {}
    rows: dict[str, Row] = {}
    eager_errors: dict[str, ErrorPool] = {}
    for name in dict.fromkeys((EAGER, *names)):
        progress(f"{bursts.threads} threads: {name}")
        rows[name] = _prepare(name, setup, eager_errors, ready)
    chosen = {name: entry for name, entry in ready.items() if name in names}
    if chosen:
        progress(f"{bursts.threads} threads: timing {', '.join(chosen)}")
        _time(chosen, setup.work, bursts, seconds)
    return [rows[name] for name in names]


def _prepare(name: str, setup: _Setup, eager_errors: dict[str, ErrorPool], ready: dict[str, _Ready]) -> Row:
    """Compile, check and warm a candidate; add it to ``ready`` if correct. Eager sets ``eager_errors``."""
    row = Row(name)
    try:
        step = build(name, setup.work, setup.state, setup.inputs, setup.mask)
        if isinstance(step, str):
            row.status, row.reason = "not run", step
            return row
        with CANDIDATES[name].preparing():
            step.prepare()
        step.check()
        pools = errors(_results(name, step, setup.mask), setup.truth)
        if name == EAGER:
            eager_errors.update(pools)
        row.errors = {key: e if math.isfinite(e := pool.error) else None for key, pool in pools.items()}
        broken = broken_rules(getattr(torch, setup.work.case.dtype), pools, eager_errors)
        if broken:
            row.status, row.reason = "wrong", "; ".join(broken)
            return row
        start = time.perf_counter()
        step(0)
        ready[name] = _Ready(row, step, time.perf_counter() - start)
    except Exception as error:  # a candidate's failure is a result and must not affect the others
        if name == EAGER:
            raise
        _fail(row, error)
    return row


def _fail(row: Row, error: Exception) -> None:
    lines = str(error).strip().splitlines()
    row.status, row.reason = "failed", f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _time(ready: Mapping[str, _Ready], work: CpuCase, bursts: Bursts, seconds: float) -> None:
    """Time the candidates and fill in their rows."""
    samples: dict[str, list[Sample]] = {name: [] for name in ready}
    alive = dict(ready)
    for _ in range(_MAX_ATTEMPTS):
        timings, failures = interleave(
            {name: entry.step for name, entry in alive.items()},
            bursts.timer(timer_for(CPU)),
            {name: entry.seconds for name, entry in alive.items()},
            seconds,
        )
        for name, error in failures.items():
            _fail(alive.pop(name).row, error)
        for name, timing in timings.items():
            samples[name] += [sample for sample in timing.samples if isinstance(sample, Sample)]
        if all(len(bursts.quiet(samples[name])) >= MIN_QUIET for name in alive):
            break
    bursts.measure_peak()
    for name, entry in alive.items():
        _fill(entry.row, samples[name], work, bursts)
    medians = {name: entry.row.median_ms for name, entry in alive.items()}
    for name, entry in alive.items():
        for baseline in BASELINES:
            mine, theirs = medians[name], medians.get(baseline)
            if name != baseline and mine is not None and theirs is not None:
                entry.row.ratio[baseline] = theirs / mine


def _fill(row: Row, samples: Sequence[Sample], work: CpuCase, bursts: Bursts) -> None:
    kept = bursts.quiet(samples)
    row.samples, row.dropped = len(kept), len(samples) - len(kept)
    row.fastest_ms = 1e3 * min(samples) if samples else None
    if len(kept) < MIN_QUIET:
        row.status = "noisy"
        row.reason = f"{len(kept)} of {len(samples)} samples were quiet, but {MIN_QUIET} are needed"
        return
    timing = Timing(tuple(kept))
    if timing.p80 > MAX_SPREAD * timing.p20:
        row.status = "noisy"
        row.reason = f"p80 is {timing.p80 / timing.p20:.1f} times p20 among {len(kept)} samples"
        return
    row.median_ms, row.p20_ms, row.p80_ms = (1e3 * t for t in (timing.median, timing.p20, timing.p80))
    row.gflops = work.flops / timing.median * 1e-9
    if bursts.peak is not None:
        row.share = row.gflops / bursts.peak


def _add_scaling(rows: Mapping[int, Sequence[Row]]) -> None:
    single = {row.candidate: row.median_ms for row in rows.get(1, ())}
    for threads, measured in rows.items():
        for row in measured:
            alone = single.get(row.candidate)
            if threads > 1 and alone is not None and row.median_ms is not None:
                row.scaling = alone / row.median_ms
