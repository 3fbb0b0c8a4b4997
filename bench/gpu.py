"""Everything that only a GPU can show, most valuable first: ``python -m bench.gpu --out DIR --commit SHA``.

Appends one line a case to ``DIR/gpu.jsonl``, and the device tests' summary as a line of its own. Run again
after a cut, it goes on with what is missing for this commit and device. A candidate that breaks the device
or hangs is noted in ``DIR/crashes.jsonl``, the process starts itself afresh, and the case is run without it.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench import puzzle, training
from bench.puzzle import PuzzleCase
from bench.training import TrainingCase
from llm_trm.benchmark.candidates import CANDIDATES, candidates_for
from llm_trm.benchmark.environment import device_name, run_record
from llm_trm.benchmark.results import CaseResult, append, key_of, read
from llm_trm.benchmark.runner import Budget, DeviceLostError, run_case
from llm_trm.benchmark.suites import Group, group_of, suite
from llm_trm.benchmark.table import footnotes, markdown_table, title
from llm_trm.benchmark.workloads import Case, Mode

TESTS_SECONDS = 150.0
#: A candidate that hangs is given up after so long; max-autotune compiles for minutes.
HANG_SECONDS = 120.0
HANG_SECONDS_MAX_AUTOTUNE = 300.0
TIMED_SECONDS = 3.0
#: Most seconds of timed rounds of a trainer's case; three of the original trainer are always made.
TRAINING_SECONDS = 30.0
#: What torch.compile is expected to take for a forward case, until it has been seen.
COMPILE_SECONDS = 10.0
#: With less than this left no case is begun: torch.compile alone would take it.
LEAST_SECONDS = 25.0


@dataclass(frozen=True)
class Part:
    """Cases that share their rows and the most seconds that one of them may take, compiling included."""

    cases: Sequence[Case]
    group: Group = "main"
    case_seconds: float = 90.0


def _part(name: str, *modes: Mode, dtype: str = "bfloat16", case_seconds: float = 90.0) -> Part:
    # Peers of the paper's block compile for long, and have a part of their own.
    group = "main" if name == "paper" else group_of(name)
    return Part(suite(name, "cuda", dtype, modes or None), group, case_seconds)


#: Measured before the device tests, in this order: were the rest cut off, these would say the most.
FIRST = (
    _part("phase2", "forward"),
    _part("paper", "forward"),
    _part("latents", "forward"),
    _part("train"),
    _part("phase2", "train"),
    _part("paper", "train"),
    _part("latents", "train"),
)

#: Measured after them, in this order.
THEN = (
    _part("peers", case_seconds=180.0),
    _part("scaling", case_seconds=45.0),
    *(
        _part(name, dtype=dtype)
        for dtype in ("float32", "float16")
        for name in ("phase2", "paper", "latents")
    ),
    _part("train", dtype="float32"),
)


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
        self.compile_seconds = COMPILE_SECONDS
        self.doing: tuple[Case | TrainingCase | PuzzleCase, str] | None = None
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

    def done(self, *, whole: bool = False) -> set[str]:
        """Keys of the cases (and ``tests``) that were measured; ``whole``: less those with skipped rows."""
        return {
            line["name"]
            for line in self._mine(self.results)
            if not whole or all(row["status"] != "skipped" for row in line.get("rows", ()))
        }

    def excluded(self, case: Case | TrainingCase | PuzzleCase) -> dict[str, str]:
        """Candidates that broke the device on this case before, in whatever part."""
        return {
            line["backend"]: line["reason"] for line in self._mine(self.crashes) if line["name"] == case.name
        }

    def part(self, part: Part, *, whole: bool = False) -> None:
        """Run what is missing of a part while time is left; ``whole`` runs cases with skipped rows again."""
        for case in part.cases:
            key = key_of(case, part.group)
            if key in self.done(whole=whole):
                print(f"already measured: {key}", flush=True)
                continue
            if any(name not in CANDIDATES for name in self.excluded(case)):
                print(f"given up, see {self.crashes}: {key}", flush=True)
                continue
            if self.left < LEAST_SECONDS:
                print(f"no time left: {key}", flush=True)
                continue
            self.case(case, part)

    def case(self, case: Case, part: Part) -> None:
        """Run one case and append its line."""
        gc.collect()  # graphs of the last case hang in cycles
        torch.cuda.empty_cache()

        def progress(doing: str) -> None:
            self.doing, self.since = (case, doing), time.time()

        seconds = min(self.left - 10, part.case_seconds)
        budget = Budget(seconds, min(TIMED_SECONDS, self.left / 8), self.compile_seconds)
        names = candidates_for(case, "cuda", part.group)
        begin = time.time()
        try:
            result = run_case(
                case,
                self.device,
                names,
                budget,
                progress,
                excluded=self.excluded(case),
                group=part.group,
            )
        except DeviceLostError as error:
            self.restart(case, error.backend, str(error))
        except Exception:  # the other cases are worth more than an early end
            traceback.print_exc()
            return
        finally:
            self.doing = None
            self.compile_seconds = budget.compile_seconds
        append(self.results, self.record | result.to_json())
        _show(result, time.time() - begin)

    def training(self, case: TrainingCase | PuzzleCase) -> None:
        """Time a trainer against the original one, restated, if that is missing and time is left."""
        if case.name in self.done() or self.excluded(case) or self.left < 2 * TRAINING_SECONDS:
            return

        def progress(doing: str) -> None:
            self.doing, self.since = (case, doing), time.time()

        try:
            if isinstance(case, TrainingCase):
                line = training.run_case(case, self.device, TRAINING_SECONDS, progress)
            else:
                line = puzzle.run_case(case, self.device, TRAINING_SECONDS, progress)
        except Exception:  # the other cases are worth more than an early end
            traceback.print_exc()
            return
        finally:
            self.doing = None
        append(self.results, self.record | line)
        describe = training.describe if isinstance(case, TrainingCase) else puzzle.describe
        print(f"\n{describe(line)}", flush=True)

    def restart(self, case: Case | TrainingCase | PuzzleCase, backend: str, reason: str) -> None:
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
            if doing is None:
                continue
            case, backend = doing
            patience = _patience(backend)
            if time.time() - since > patience:
                self.restart(case, backend, f"{backend} took more than {patience:.0f} s")

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


def _patience(doing: str) -> float:
    candidate = CANDIDATES.get(doing)
    compiles_long = candidate is not None and candidate.compiles > 1.0
    return HANG_SECONDS_MAX_AUTOTUNE if compiles_long else HANG_SECONDS


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
    for part in FIRST:
        run.part(part)
    trainers: list[TrainingCase | PuzzleCase] = [*training.CASES["cuda"], *puzzle.CASES["cuda"]]
    for case in trainers:
        run.training(case)
    run.tests()
    for part in THEN:
        run.part(part)
    # Last, or a case that never fits its share would keep all others from their first turn.
    for part in (*FIRST, *THEN):
        run.part(replace(part, case_seconds=2 * part.case_seconds), whole=True)


if __name__ == "__main__":
    main()
