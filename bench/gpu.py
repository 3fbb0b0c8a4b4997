"""Everything that only a GPU can show, most valuable first: ``python -m bench.gpu --out DIR --commit SHA``.

Appends one line a case to ``DIR/gpu.jsonl``, and the device tests' summary as a line of its own. Run again
after a cut, it goes on with what is missing for this commit and device. A candidate that breaks the device
or hangs is noted in ``DIR/crashes.jsonl``, the process starts itself afresh, and the case is run without it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llm_trm.benchmark.candidates import candidates_for
from llm_trm.benchmark.environment import device_name, run_record
from llm_trm.benchmark.results import CaseResult, append, read
from llm_trm.benchmark.runner import Budget, DeviceLostError, run_case
from llm_trm.benchmark.table import footnotes, markdown_table, title
from llm_trm.benchmark.workloads import Case

TESTS_SECONDS = 150.0
#: A case gets this long at most, compiling included; a candidate that hangs is given up a little later.
CASE_SECONDS = 90.0
HANG_SECONDS = 120.0
TIMED_SECONDS = 3.0
#: With less than this left no case is begun: torch.compile alone would take it.
LEAST_SECONDS = 25.0

_PHASE2 = Case("forward", 256, 256, dtype="bfloat16")
_LATENTS = replace(_PHASE2, hidden_size=2048)
_PAPER = Case("forward", 512, 97, batch=768, dtype="bfloat16", family="paper")


def _both(case: Case, **changes: Any) -> list[Case]:
    return [replace(case, mode=mode, **changes) for mode in ("forward", "train")]


#: Measured before the device tests: were the rest cut off, these would say the most.
FIRST = [*_both(_PHASE2), _LATENTS]

#: Measured after them, in this order.
THEN = [
    *_both(_PHASE2, batch=32),
    *_both(_LATENTS, batch=8),
    replace(_LATENTS, mode="train"),
    *_both(_PAPER),
    *_both(_PHASE2, dtype="float32"),
    *_both(_PHASE2, dtype="float16"),
    *_both(_LATENTS, batch=8, dtype="float32"),
    *_both(_LATENTS, batch=8, dtype="float16"),
    *_both(_PHASE2, batch=32, dtype="float32"),
    *_both(_PHASE2, batch=32, dtype="float16"),
    *_both(_PAPER, dtype="float32"),
    *_both(_PAPER, dtype="float16"),
]


class Run:
    """One invocation: its folder, its deadline, and what is already in the folder."""

    def __init__(self, out: Path, commit: str, deadline: float) -> None:
        self.out = out
        self.results = out / "gpu.jsonl"
        self.crashes = out / "crashes.jsonl"
        self.commit = commit
        self.deadline = deadline
        self.device = torch.device("cuda")
        self.record = run_record(self.device, commit)
        self.doing: tuple[Case, str] | None = None
        self.since = time.time()

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.time()

    def _mine(self, path: Path) -> Iterator[dict[str, Any]]:
        device = device_name(self.device)
        for line in read(path):
            if line.get("commit") == self.commit and line.get("device") == device:
                yield line

    def done(self) -> set[str]:
        """Names of the cases (and ``tests``) that need not run again; one with skipped rows does."""
        return {
            line["name"]
            for line in self._mine(self.results)
            if all(row["status"] != "skipped" for row in line.get("rows", ()))
        }

    def excluded(self, case: Case) -> dict[str, str]:
        """Candidates that broke the device on this case before."""
        return {
            line["backend"]: line["reason"] for line in self._mine(self.crashes) if line["name"] == case.name
        }

    def cases(self, cases: Sequence[Case]) -> None:
        """Run what is missing of ``cases`` while time is left."""
        for case in cases:
            if case.name in self.done():
                print(f"already measured: {case.name}", flush=True)
                continue
            if any(name not in candidates_for("cuda") for name in self.excluded(case)):
                print(f"given up, see {self.crashes}: {case.name}", flush=True)
                continue
            if self.left < LEAST_SECONDS:
                print(f"no time left: {case.name}", flush=True)
                continue
            self.case(case)

    def case(self, case: Case) -> None:
        """Run one case and append its line."""
        torch.cuda.empty_cache()

        def progress(doing: str) -> None:
            self.doing, self.since = (case, doing), time.time()

        budget = Budget(min(self.left - 10, CASE_SECONDS), min(TIMED_SECONDS, self.left / 8))
        begin = time.time()
        try:
            result = run_case(
                case, self.device, candidates_for("cuda"), budget, progress, excluded=self.excluded(case)
            )
        except DeviceLostError as error:
            self.restart(case, error.backend, str(error))
        except Exception:  # the other cases are worth more than an early end
            traceback.print_exc()
            return
        finally:
            self.doing = None
        append(self.results, self.record | result.to_json())
        _show(result, time.time() - begin)

    def restart(self, case: Case, backend: str, reason: str) -> None:
        """Note who broke the device, and begin afresh in a new process image. Does not return."""
        print(f"starting afresh: {reason}", flush=True)
        line = {"commit": self.commit, "device": device_name(self.device), "name": case.name}
        append(self.crashes, line | {"backend": backend, "reason": reason})
        arguments = ["--out", str(self.out), "--commit", self.commit, "--deadline", str(self.deadline)]
        os.execv(sys.executable, [sys.executable, "-m", "bench.gpu", *arguments])

    def watch(self) -> None:
        """Give up a candidate that hangs: a kernel that waits for ever cannot be interrupted otherwise."""
        while True:
            time.sleep(1.0)
            doing, since = self.doing, self.since
            if doing is not None and time.time() - since > HANG_SECONDS:
                case, backend = doing
                self.restart(case, backend, f"{backend} took more than {HANG_SECONDS:.0f} s")

    def tests(self) -> None:
        """Run the tests that launch kernels in a process of their own; the output goes to gpu-tests.txt."""
        seconds = min(TESTS_SECONDS, self.left - LEAST_SECONDS)
        if "tests" in self.done() or seconds < LEAST_SECONDS:
            return
        if importlib.util.find_spec("pytest") is None:
            print("device tests: pytest is not installed", flush=True)
            return
        log = self.out / "gpu-tests.txt"
        command = [sys.executable, "-m", "pytest", "tests", "-m", "gpu or interpreter", "-q", "--maxfail=20"]
        if importlib.util.find_spec("xdist") is not None:
            command += ["-n", "8"]  # most of their time is Triton compiling
        begin = time.time()
        with log.open("w") as file:
            try:
                code = subprocess.run(
                    command, stdout=file, stderr=subprocess.STDOUT, timeout=seconds
                ).returncode
            except subprocess.TimeoutExpired:
                code = 124
        lines = log.read_text(errors="replace").strip().splitlines()
        summary = lines[-1].strip("= ") if lines else "no output"
        print(f"device tests: exit code {code}, {summary}", flush=True)
        line = {"name": "tests", "device": device_name(self.device), "code": code, "summary": summary}
        append(self.results, self.record | line | {"seconds": round(time.time() - begin, 1)})


def _show(result: CaseResult, seconds: float) -> None:
    print(f"\n{title(result)}, {seconds:.0f} s\n{markdown_table(result)}")
    print("\n".join(footnotes(result)), flush=True)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder that results are appended in")
    parser.add_argument("--commit", required=True, help="the commit that is measured")
    parser.add_argument("--budget-minutes", type=float, default=9.0)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.budget_minutes <= 0:
        parser.error("--budget-minutes must be positive")
    if not torch.cuda.is_available():
        print("bench.gpu needs a CUDA GPU, and PyTorch sees none here", file=sys.stderr)
        sys.exit(2)
    # Triton 3.10 changes this default; results must not change with it.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = options.deadline or time.time() + 60 * options.budget_minutes
    run = Run(options.out, options.commit, deadline)
    threading.Thread(target=run.watch, daemon=True).start()
    run.cases(FIRST)
    run.tests()
    run.cases(THEN)


if __name__ == "__main__":
    main()
