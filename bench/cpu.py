"""Times a recursion on a CPU, native kernels against plain PyTorch: ``python -m bench.cpu``.

A case is one latent recursion (n = 6), forward or forward and backward. All candidates of a case are timed in
one process in interleaved rounds. A sample counts if the bursts of arithmetic before and after it run at 0.9
or more of the rate that the case's bursts reach. A candidate whose error against float64 violates the
tolerance rule gets no speed. One line of JSON per case is appended to bench/results/native.jsonl;
``python -m bench.report`` updates docs/cpu.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import torch

from bench import cpu_report, quiet
from bench.cpu_candidates import CANDIDATES, names_for
from bench.cpu_cases import QUICK, SHAPES, CpuCase, cases
from bench.cpu_cases import quick as shrunk
from bench.cpu_measure import CPU, run_case
from bench.quiet import Bursts
from llm_trm.benchmark.environment import cpu_name, run_record
from llm_trm.benchmark.results import append
from llm_trm.benchmark.workloads import Mode

RESULTS = Path(__file__).resolve().parent / "results" / "native.jsonl"


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run. Exit code 1: a candidate is wrong or fails; 2: bad input."""
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m bench.cpu",
        description=f"{description}\n\n{rest}",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", nargs="+", choices=SHAPES, metavar="CASE", help=", ".join(SHAPES))
    parser.add_argument("--modes", nargs="+", choices=("forward", "train"), default=("forward", "train"))
    parser.add_argument("--lengths", nargs="+", choices=("fixed", "ragged"), default=("fixed", "ragged"))
    parser.add_argument("--threads", nargs="+", type=int, default=(2,), metavar="N", help="(default: 2)")
    parser.add_argument(
        "--candidates", nargs="+", choices=CANDIDATES, metavar="NAME", help=", ".join(CANDIDATES)
    )
    parser.add_argument(
        "--seconds", type=float, help="Duration of timed rounds per case and number of threads (default: 20)."
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of weights and inputs (default: 0).")
    parser.add_argument(
        "--quick", action="store_true", help="Run tiny cases as a test; results are saved only with --out."
    )
    parser.add_argument(
        "--out",
        type=Path,
        help=f"Results file to append to (default: {RESULTS.relative_to(RESULTS.parents[2])}).",
    )
    parser.add_argument("--commit", help="Measured commit (default: the checkout's).")
    options = parser.parse_args(arguments)
    out: Path | None = options.out or (None if options.quick else RESULTS)
    seconds = options.seconds if options.seconds is not None else (0.2 if options.quick else 20.0)
    if not seconds > 0:
        parser.error("--seconds must be positive")
    if min(options.threads) < 1:
        parser.error("--threads must be at least 1")
    if out is not None and not out.parent.is_dir():
        parser.error(f"--out: the folder {out.parent} does not exist; create it first")
    modes = [mode for mode in get_args(Mode) if mode in options.modes]
    ragged = [kind == "ragged" for kind in dict.fromkeys(options.lengths)]
    chosen: Sequence[str] = options.cases or (QUICK if options.quick else tuple(SHAPES))
    works = cases(chosen, modes, ragged, options.seed)
    if options.quick:
        works = list(dict.fromkeys(map(shrunk, works)))
    if not works:
        parser.error("no case is left: a batch of one sample has no ragged lengths")
    native = quiet.native_module()
    machine = {threads: Bursts(threads, native) for threads in sorted(set(options.threads))}
    before = torch.get_num_threads()
    try:
        ended_well = _run(works, machine, options.candidates, seconds, out, options.commit)
    finally:
        torch.set_num_threads(before)
    if not ended_well:
        sys.exit(1)


def _run(
    works: Sequence[CpuCase],
    machine: Mapping[int, Bursts],
    chosen: Sequence[str] | None,
    seconds: float,
    out: Path | None,
    commit: str | None,
) -> bool:
    """Run, print and record the cases. Returns False if a candidate is wrong or fails."""
    record = run_record(CPU, commit)
    record["machine"] |= {
        "device": cpu_name(),
        "threads": list(machine),
        "instruction_sets": quiet.record(quiet.native_module()),
    }
    print(f"{cpu_name()}, torch {record['versions']['torch']}", flush=True)
    good = True
    for work in works:
        names = [name for name in names_for(work) if chosen is None or name in chosen]
        if not names:
            print(f"\n{work.name}: none of the requested candidates supports this case", flush=True)
            continue
        line = record | run_case(work, machine, names, seconds, _progress)
        print(f"\n{cpu_report.describe(line)}", flush=True)
        rows = [row for part in line["measurements"] for row in part["measured"]]
        good &= all(row["status"] not in ("wrong", "failed") for row in rows)
        if out is not None:
            append(out, line)
    return good


def _progress(doing: str) -> None:
    print(f"  {doing}", file=sys.stderr, flush=True)


_EXAMPLES = """\
examples:
  python -m bench.cpu                                       all cases on two threads
  python -m bench.cpu --threads 1 2                         all cases on one and on two threads
  python -m bench.cpu --cases d256 d512 --modes forward     some cases
  python -m bench.cpu --candidates eager native             without torch.compile, which is slow to compile
  python -m bench.cpu --quick                               a quick test of the command
"""

if __name__ == "__main__":
    main()
