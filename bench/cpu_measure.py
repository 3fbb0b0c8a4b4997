"""One case of ``bench/cpu.py``: every candidate is checked against float64, and timed if it is right."""

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

#: Ratios are given against these, where they were timed.
BASELINES = (EAGER, ORIGINAL)

#: Fewest quiet samples that a median is taken of.
MIN_QUIET = MIN_ROUNDS
#: Of a candidate's 20th percentile: where the 80th is more, the quiet check saw too little.
MOST_SPREAD = 1.5
#: Times that the timed rounds of a case are taken, until every candidate has enough quiet samples.
_TRIES = 3


@dataclass
class Row:
    """One candidate on one number of threads. Figures that were not taken, or are withheld, are None.

    Attributes:
        status: ``ok``, ``wrong`` (breaks the tolerance rule), ``noisy`` (too few quiet samples, or too
            unlike), ``not run`` (cannot serve the case) or ``failed`` (raised an error).
        reason: Why the status is not ``ok``.
        median_ms, p20_ms, p80_ms: Milliseconds a call.
        samples: Quiet samples behind them.
        dropped: Samples beside a slow burst.
        fastest_ms: Milliseconds of the fastest call, dropped ones included: interruptions only add to a call.
        gflops: 1e9 operations on valid rows a second.
        share: Of the measured FMA peak.
        ratio: Median of each baseline over this row's.
        scaling: Median on one thread over this row's, where both were timed in this run.
        errors: Relative Frobenius error against float64 of ``output`` and, in training, ``gradients``; None
            where it is not finite.
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
    """What all candidates of a case share."""

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
            inputs.grad_y.mul_(mask[..., None])  # nothing reads what the original computes at padding
        return cls(work, state, inputs, mask, _truth(work, state, inputs, mask))


def _truth(work: CpuCase, state: State, inputs: Inputs, mask: Tensor | None) -> dict[str, Tensor]:
    """Output and gradients of the reference in float64, as :meth:`Step.results` names them."""
    x, y, z = (tensor.double() for tensor in inputs[0])
    model = written_out(reference_network)(
        work, {name: tensor.double() for name, tensor in state.items()}, mask
    )
    step = Step(work.case, model, Inputs([x], [y], [z], inputs.grad_y.double(), inputs.labels, inputs.head))
    step(0)
    return dict(step.results())


def _results(name: str, step: Step, mask: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    for key, tensor in step.results():
        # The original leaves at padding what it computed there; all others owe zeros.
        hidden = name == ORIGINAL and key == "output" and mask is not None
        yield key, tensor.masked_fill(~mask[..., None], 0.0) if hidden and mask is not None else tensor


@dataclass
class _Ready:
    """A candidate that gave the right result, and the seconds of a warm call."""

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
    """Check every candidate and time those that are right, on each number of threads.

    Args:
        machine: Bursts by number of threads, which the cases of a run share.
        names: Candidates; the rows keep their order. ``eager`` runs in any case: the rule is stated in its
            error.
        seconds: Of timed rounds on each number of threads; at least three rounds are made.
        progress: Told what is begun.

    Returns:
        A line for a results file, run details aside.
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
    # Without a reset torch.compile would meet the second shape of a run with dynamic shapes.
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
    """Compile, check and warm one candidate; it is ``ready`` if right. Eager sets ``eager_errors``."""
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
        begin = time.perf_counter()
        step(0)
        ready[name] = _Ready(row, step, time.perf_counter() - begin)
    except Exception as error:  # a candidate's failure is a result, and no reason to lose the others
        if name == EAGER:
            raise
        _fail(row, error)
    return row


def _fail(row: Row, error: Exception) -> None:
    lines = str(error).strip().splitlines()
    row.status, row.reason = "failed", f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _time(ready: Mapping[str, _Ready], work: CpuCase, bursts: Bursts, seconds: float) -> None:
    """Fill in the rows' figures."""
    samples: dict[str, list[Sample]] = {name: [] for name in ready}
    alive = dict(ready)
    for _ in range(_TRIES):
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
        row.reason = f"{len(kept)} of {len(samples)} samples were quiet, {MIN_QUIET} are needed"
        return
    timing = Timing(tuple(kept))
    if timing.p80 > MOST_SPREAD * timing.p20:
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
