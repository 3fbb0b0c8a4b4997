"""Runs the device tests and commands of ``llm-trm``."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.gpu import verdicts
from bench.gpu.context import Context
from bench.pretend import python

#: Seconds between the signal that asks pytest for its summary and the signal that kills it.
_SUMMARY_SECONDS = 6.0
_WORKERS = 14


def run_tests(context: Context) -> None:
    """Run the device tests in the given files, with output in gpu-tests.txt and failures in a result line."""
    log = context.out / "gpu-tests.txt"
    command = [sys.executable, "-m", "pytest", *context.argument["files"], "-m", "gpu or interpreter"]
    # If pytest is killed, it prints no summary.
    command += ["-v", "--tb=short", "-p", "no:cacheprovider", "-p", verdicts.__name__]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(_WORKERS, os.cpu_count() or 1))]  # most of their time is Triton compiling
    context.doing("pytest", context.left + 2 * _SUMMARY_SECONDS)
    with log.open("w") as file:
        code, seconds = _finished(command, context.left - _SUMMARY_SECONDS - 2.0, file)
    lines = log.read_text(errors="replace").splitlines()
    verdict_lines = [
        line.removeprefix(verdicts.MARK).split(" ", 1) for line in lines if line.startswith(verdicts.MARK)
    ]
    failed = sorted({name for verdict, name in verdict_lines if verdict == "failed"})
    passed = len({name for _, name in verdict_lines}) - len(failed)
    print(f"device tests: exit code {code}, {passed} passed, failed: {failed}", flush=True)
    line = {"name": "tests", "code": code, "passed": passed, "failed": failed, "seconds": seconds}
    context.line(line | {"ok": not failed})
    if failed:
        raise AssertionError(f"{len(failed)} device tests failed: {', '.join(failed[:20])}")
    if not passed:
        raise RuntimeError(f"no device test ran (exit code {code}): see gpu-tests.txt")


def _finished(command: Sequence[str], seconds: float, output: Any) -> tuple[int, float]:
    """Exit code (124 if it exceeded its time) and duration in seconds of a command."""
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(_SUMMARY_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
        code = 124
    return code, round(time.monotonic() - start, 1)


def run_command(context: Context) -> None:
    """Run a command and show its output."""
    _run(context, context.argument["arguments"])


def _run(context: Context, arguments: Sequence[str]) -> None:
    context.doing(context.task.name, context.left)
    sys.stdout.flush()
    code, seconds = _finished([*python(), *arguments], context.left - 3.0, None)
    context.line({"name": context.task.name, "code": code, "seconds": seconds, "ok": code == 0})
    if code:
        raise RuntimeError(f"exit code {code} after {seconds} s: {' '.join(arguments)}")


def run_phase2(context: Context) -> None:
    """Run ``llm-trm train phase2`` at SmolLM3's width, with random pairs and an untrained compressor."""
    from bench.training import TrainingCase, write_data

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        case = TrainingCase(256, 256, batch=32, batches=4)
        write_data(case, folder / "pairs", folder / "compressor", seed=0, hidden_size=2048)
        where = ["--data", str(folder / "pairs"), "--compressor", str(folder / "compressor")]
        size = ["--batch-size", "32", "--epochs", "1", "-o", str(folder / "run"), "--device", "cuda"]
        _run(context, ["llm_trm", "train", "phase2", *where, *size])
