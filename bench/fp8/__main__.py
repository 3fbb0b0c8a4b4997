"""``python -m bench.fp8`` trains and tests networks with and without fp8, and updates docs/fp8.md.

Appends one line per network to ``bench/results/fp8.jsonl``. On a CUDA device of compute capability 9.0 or
newer it runs the kernels; elsewhere it emulates fp8. Takes about ten minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import multiprocessing
import sys
from collections.abc import Sequence
from typing import Any

import torch

from bench.fp8.report import draw
from bench.fp8.study import TRAININGS, Settings, run
from bench.report import BEGIN, END, ROOT
from llm_trm.benchmark.results import append
from trm_kernels.config import Family

FAMILIES: tuple[Family, ...] = ("seed", "paper")
RESULTS = ROOT / "bench" / "results" / "fp8.jsonl"


def _show(line: dict[str, Any]) -> None:
    exact = ", ".join(f"{mode} {100 * found['exact']:.1f}%" for mode, found in line["evaluation"].items())
    print(
        f"{line['family']} block, seed {line['seed']}, trained in {line['training']}: "
        f"loss {line['training_loss']:.4f}; puzzles solved: {exact}",
        flush=True,
    )


def study(
    device: torch.device,
    settings: Settings,
    families: Sequence[Family],
    seeds: int,
    jobs: int,
    commit: str | None,
) -> None:
    """Run all families, seeds and trainings, ``jobs`` at a time, and append each line when it is done."""
    runs = itertools.product(range(seeds), families, TRAININGS)
    with concurrent.futures.ProcessPoolExecutor(
        jobs,
        # Spawn, because forking after torch has started threads may hang.
        mp_context=multiprocessing.get_context("spawn"),
        # One core per run.
        initializer=torch.set_num_threads,
        initargs=(1,),
    ) as pool:
        pending = [
            pool.submit(run, family, seed, training, settings, device, commit)
            for seed, family, training in runs
        ]
        for done in concurrent.futures.as_completed(pending):
            line = done.result()
            append(RESULTS, line)
            _show(line)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m bench.fp8", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu (emulated, the default) or cuda (kernels).")
    parser.add_argument(
        "--families", nargs="+", choices=FAMILIES, default=FAMILIES, help="Block families (default: both)."
    )
    parser.add_argument("--seeds", type=int, default=3, help="Number of networks of each kind.")
    parser.add_argument("--batches", type=int, default=Settings.batches, help="Training batches per network.")
    parser.add_argument("--jobs", type=int, help="Parallel trainings (default: 2 on a CPU, 1 on a GPU).")
    parser.add_argument("--commit", help="Measured commit, if this is not a checkout.")
    parser.add_argument("--report", action="store_true", help="Only update docs/fp8.md, without training.")
    options = parser.parse_args()
    if options.seeds < 1 or options.batches < 1 or (options.jobs is not None and options.jobs < 1):
        parser.error("--seeds, --batches and --jobs must be at least 1")
    device = torch.device(options.device)
    if not options.report:
        jobs = options.jobs or (2 if device.type == "cpu" else 1)
        settings = Settings(batches=options.batches)
        study(device, settings, options.families, options.seeds, jobs, options.commit)
    if not draw(ROOT, RESULTS):
        print(f"no {BEGIN} ... {END} in docs/fp8.md", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
