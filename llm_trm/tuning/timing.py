"""Times the candidates of one problem in interleaved rounds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from llm_trm.benchmark.protocol import Call, Timer, interleave, synchronize, timer_for
from llm_trm.tuning.calls import RecordedCall, input_sets, random
from trm_kernels.graphs import Capturer, CudaCapturer
from trm_kernels.ops.dispatch import chosen_by
from trm_kernels.ops.tiles import Choice

#: Calls per captured graph, enough to make the cost of a replay negligible.
_CALLS_PER_GRAPH = 16
#: Minimum duration of timed rounds per problem, and per candidate, in seconds.
_SECONDS, _SECONDS_EACH = 0.2, 0.02


@dataclass
class Times:
    """Measurements of one problem.

    Attributes:
        ms: Median milliseconds of each candidate that ran.
        failures: Reasons why the others failed.
    """

    ms: dict[Choice, float] = field(default_factory=dict)
    failures: dict[Choice, str] = field(default_factory=dict)


#: ``measure(call, choices)``: the times of a call with each choice.
Measure = Callable[[RecordedCall, Sequence[Choice]], Times]


def measure_on(device: torch.device, timer: Timer | None = None) -> Measure:
    """A function that measures on ``device``; on CUDA with captured graphs, to exclude host overhead."""
    return functools.partial(_measure, device, timer or timer_for(device))


def _measure(device: torch.device, timer: Timer, call: RecordedCall, choices: Sequence[Choice]) -> Times:
    cuda = device.type == "cuda"
    cache = torch.cuda.get_device_properties(device).L2_cache_size if cuda else 0
    sets = [call.prepare(lambda spec: random(spec, device)) for _ in range(input_sets(call, cache))]
    times = Times()
    runs: dict[str, Call] = {}
    expected: dict[str, float] = {}
    names = {str(position): choice for position, choice in enumerate(choices)}
    repeats = _CALLS_PER_GRAPH if cuda else 1
    capturer = CudaCapturer()
    with torch.no_grad():
        for name, choice in names.items():
            try:
                runs[name] = _captured(sets, choice, capturer, device) if cuda else _plain(sets, choice)
                runs[name](0)
                synchronize(device)
                expected[name] = timer(runs[name], 0, 1)
            except Exception as error:  # any failure excludes the candidate
                times.failures[choice] = f"{type(error).__name__}: {str(error)[:200]}"
                runs.pop(name, None)
        budget = max(_SECONDS, _SECONDS_EACH * len(runs))
        timings, failures = interleave(runs, timer, expected, budget)
    times.ms = {names[name]: timing.median * 1e3 / repeats for name, timing in timings.items()}
    times.failures |= {names[name]: str(error)[:200] for name, error in failures.items()}
    return times


def _plain(sets: Sequence[Callable[[], object]], choice: Choice) -> Call:
    def run(index: int) -> object:
        with chosen_by(lambda problem, target: choice):
            return sets[index % len(sets)]()

    return run


def _captured(
    sets: Sequence[Callable[[], object]], choice: Choice, capturer: Capturer, device: torch.device
) -> Call:
    """A graph of calls that cycle through the input sets."""

    def run() -> None:
        for index in range(_CALLS_PER_GRAPH):
            sets[index % len(sets)]()

    # Unlike torch's own context, the capturer restores the stream if a capture fails, for the next candidate.
    with chosen_by(lambda problem, target: choice):
        graph = capturer.capture(run, device, capturer.new_pool(), warmup=1)
    return lambda _: graph.replay()
