"""Measures the cost of checking for changed weights: ``python -m bench.weights``.

Times one network call and one deep recursion (n = 6, T = 3) of two blocks on 16 positions, without gradients,
on the native backend: with unchanged weights, which every call reads to detect changes (``native``), with
``frozen`` weights, and with weights that are ``changed`` before every call. Eager PyTorch is timed in the
same interleaved rounds of one process, between bursts that detect noise. One line of JSON per number of
threads is appended to bench/results/weights.jsonl; ``python -m bench.report`` updates docs/cpu.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from bench import quiet
from bench.cpu_measure import CPU, MIN_QUIET
from bench.puzzle_report import latest
from bench.quiet import Bursts, Sample
from llm_trm.benchmark.environment import cpu_name, run_record
from llm_trm.benchmark.protocol import Timing, interleave, timer_for
from llm_trm.benchmark.results import append
from llm_trm.benchmark.table import number
from trm_kernels import TinyRecursiveNetwork, deep_recursion, frozen

RESULTS = Path(__file__).resolve().parent / "results" / "weights.jsonl"
WIDTHS = (64, 256, 512, 2048)
KINDS = ("call", "recursion")
CANDIDATES = ("eager", "native", "frozen", "changed")
_LENGTH, _N, _T = 16, 6, 3


def measure(width: int, bursts: Bursts, seconds: float) -> dict[str, dict[str, float | None]]:
    """Median milliseconds of every candidate by kind of call; None if there are too few quiet samples."""
    torch.manual_seed(0)
    states = torch.randn(3, 1, _LENGTH, width).unbind()
    networks = {}
    for name in CANDIDATES:
        backend = "eager" if name == "eager" else "native"
        networks[name] = TinyRecursiveNetwork(width, 2, max(1, width // 64), backend=backend).eval()
        networks[name].load_state_dict(networks["eager"].state_dict())
    found = {}
    with torch.no_grad(), ExitStack() as stack:
        stack.enter_context(frozen(networks["frozen"]))
        for kind in KINDS:
            calls = {name: _call(kind, name, net, states) for name, net in networks.items()}
            bursts.begin()
            expected = {name: _warm(call) for name, call in calls.items()}
            timings, failures = interleave(calls, bursts.timer(timer_for(CPU)), expected, seconds)
            for failure in failures.values():
                raise failure
            found[kind] = {name: _median(bursts, timing) for name, timing in timings.items()}
    return found


def _call(
    kind: str, name: str, net: TinyRecursiveNetwork, states: Sequence[torch.Tensor]
) -> Callable[[int], object]:
    x, y, z = states
    weight = next(net.parameters())

    def call(_: int) -> object:
        if name == "changed":
            weight.data.mul_(-1.0)
        return net(x) if kind == "call" else deep_recursion(net, x, y, z, _N, _T)

    return call


def _warm(call: Callable[[int], object]) -> float:
    call(0)
    start = time.perf_counter()
    call(1)
    return time.perf_counter() - start


def _median(bursts: Bursts, timing: Timing) -> float | None:
    kept = bursts.quiet([sample for sample in timing.samples if isinstance(sample, Sample)])
    return 1e3 * Timing(tuple(kept)).median if len(kept) >= MIN_QUIET else None


def text(results: Path) -> str:
    """The latest results of each machine and number of threads as Markdown; empty if there are none."""
    lines = latest(results / RESULTS.name)
    if not lines:
        return ""
    head = ["d", "threads", *(f"{kind}: {name}" for kind in KINDS for name in CANDIDATES)]
    parts = [
        "## Checking the weights in every call",
        "Two blocks, 16 positions, no gradient; the percentage of eager's time is in brackets. `native` "
        "reads all weights in every call to check that they are unchanged, `frozen` is `with frozen(net):`, "
        "and with `changed` the weights change before every call and are packed again.",
    ]
    for device in dict.fromkeys(line["device"] for line in lines):
        rows = [head, ["---:"] * len(head)]
        for line in (line for line in lines if line["device"] == device):
            for width, kinds in line["ms"].items():
                cells = [_cell(kinds[kind], name) for kind in KINDS for name in CANDIDATES]
                rows.append([width, str(line["threads"]), *cells])
        parts += [f"{device}, ms:", "\n".join("| " + " | ".join(row) + " |" for row in rows)]
    return "\n\n".join(parts)


def _cell(medians: Mapping[str, float | None], name: str) -> str:
    value, eager = medians[name], medians["eager"]
    if value is None:
        return "noisy"
    relative = "" if name == "eager" or eager is None else f" ({value / eager:.0%})"
    return number(value) + relative


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure and append."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS, metavar="D", help="(default: all)")
    parser.add_argument("--threads", nargs="+", type=int, default=(1, 2), metavar="N", help="(default: 1 2)")
    parser.add_argument("--seconds", type=float, default=5.0, help="Seconds per case (default: 5).")
    parser.add_argument("--out", type=Path, default=RESULTS, help="Results file to append to.")
    parser.add_argument("--commit", help="Measured commit (default: the checkout's).")
    options = parser.parse_args(arguments)
    record: dict[str, Any] = run_record(CPU, options.commit)
    record["machine"] |= {"instruction_sets": quiet.record(quiet.native_module())}
    before = torch.get_num_threads()
    try:
        for threads in options.threads:
            torch.set_num_threads(threads)
            bursts = Bursts(threads, quiet.native_module())
            line = {
                **record,
                "name": f"weights threads{threads}",
                "device": cpu_name(),
                "threads": threads,
                "ms": {str(width): measure(width, bursts, options.seconds) for width in options.widths},
            }
            append(options.out, line)
            print(text(options.out.parent) if options.out.name == RESULTS.name else line["ms"], flush=True)
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    main()
