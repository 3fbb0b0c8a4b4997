"""What users and developers type: the device tests, and commands of ``llm-trm``."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.gpu.child import Context
from bench.pretend import python

#: Between the signal that asks pytest for its summary and the one that ends it.
_SUMMARY_SECONDS = 6.0
_WORKERS = 14


def run_tests(context: Context) -> None:
    """The device tests of the named files: output to gpu-tests.txt, names of failures to a result line."""
    log = context.out / "gpu-tests.txt"
    command = [sys.executable, "-m", "pytest", *context.argument["files"], "-m", "gpu or interpreter"]
    # Cut off, pytest prints no summary: so each failure is printed when it happens.
    command += ["-v", "--tb=short", "-p", "no:cacheprovider", "-p", "bench.gpu.failures_at_once"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(_WORKERS, os.cpu_count() or 1))]  # most of their time is Triton compiling
    context.doing("pytest", context.left + 2 * _SUMMARY_SECONDS)
    with log.open("w") as file:
        code, seconds = _finished(command, context.left - _SUMMARY_SECONDS - 2.0, file)
    text = log.read_text(errors="replace")
    # With -n the verdict stands before the name, without it behind.
    before = re.findall(r"\b(PASSED|FAILED|ERROR|SKIPPED)\s+(tests/\S+)", text)
    behind = [
        (verdict, name)
        for name, verdict in re.findall(r"(tests/\S+)\s+(PASSED|FAILED|ERROR|SKIPPED)\b", text)
    ]
    verdicts = {name: verdict for verdict, name in (*before, *behind)}
    failed = sorted(name for name, verdict in verdicts.items() if verdict in ("FAILED", "ERROR"))
    passed = sum(verdict == "PASSED" for verdict in verdicts.values())
    print(f"device tests: exit code {code}, {passed} passed, failed: {failed}", flush=True)
    line = {"name": "tests", "code": code, "passed": passed, "failed": failed, "seconds": seconds}
    context.line(line | {"ok": not failed})
    if failed:
        raise AssertionError(f"{len(failed)} device tests failed: {', '.join(failed[:20])}")
    if not passed:
        raise RuntimeError(f"no device test ran (exit code {code}): see gpu-tests.txt")


def _finished(command: Sequence[str], seconds: float, output: Any) -> tuple[int, float]:
    """Exit code (124 where its time was over) and seconds of a command."""
    begun = time.monotonic()
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
    return code, round(time.monotonic() - begun, 1)


def run_command(context: Context) -> None:
    """A command line, its output shown."""
    _run(context, context.argument["arguments"])


def _run(context: Context, arguments: Sequence[str]) -> None:
    context.doing(context.task.name, context.left)
    sys.stdout.flush()
    code, seconds = _finished([*python(), *arguments], context.left - 3.0, None)
    context.line({"name": context.task.name, "code": code, "seconds": seconds, "ok": code == 0})
    if code:
        raise RuntimeError(f"exit code {code} after {seconds} s: {' '.join(arguments)}")


def run_phase2(context: Context) -> None:
    """``llm-trm train phase2`` at SmolLM3's width, on made-up pairs and an untrained compressor."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_pairs(folder / "pairs", samples=128, width=2048)
        make_compressor(folder / "compressor", width=2048)
        where = ["--data", str(folder / "pairs"), "--compressor", str(folder / "compressor")]
        size = ["--batch-size", "32", "--epochs", "1", "-o", str(folder / "run"), "--device", "cuda"]
        _run(context, ["llm_trm", "train", "phase2", *where, *size])


def make_pairs(folder: Path, *, samples: int, width: int, longest: int = 256) -> None:
    """Pairs of random contexts of different lengths, each leading to the direction of its mean."""
    from llm_trm.data.pairs import RECORD, Pair, write_index, write_shard

    folder.mkdir(parents=True)
    chance = torch.Generator().manual_seed(0)
    pairs = []
    for index in range(samples):
        length = int(torch.randint(longest // 4, longest + 1, (), generator=chance))
        states = torch.randn(length, width, generator=chance)
        record: dict[str, Any] = dict.fromkeys(RECORD) | {"index": index, "problem": str(index)}
        pairs.append(Pair(states, states.mean(dim=0), record))
    write_shard(folder, 0, pairs, {}, width, "bfloat16")
    write_index(folder, 1, model="made up", seed=0, settings={})


def make_compressor(folder: Path, *, width: int, compressed: int = 256) -> None:
    """An untrained compressor."""
    from llm_trm.models.compression import DimensionCompressor, save_compressor

    torch.manual_seed(0)
    save_compressor(DimensionCompressor(width, compressed), folder, model="made up")
