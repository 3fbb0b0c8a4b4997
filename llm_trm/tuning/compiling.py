"""Candidates compiled ahead of their timing, in parallel processes that hold no GPU."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from llm_trm.tuning.calls import RecordedCall, empty
from trm_kernels.ops._launch import Launch, Target, record
from trm_kernels.ops.dispatch import chosen_by
from trm_kernels.ops.tiles import Choice

#: ``compile(call, choices, target)``: for each choice why it is not worth timing, or None.
Compiler = Callable[[RecordedCall, Sequence[Choice], Target], list[str | None]]


def launches(call: RecordedCall, choice: Choice, target: Target) -> list[Launch]:
    """What the call would launch with a choice."""
    with record(target) as recorded, chosen_by(lambda problem, _: choice):
        call.prepare(empty)()
    return recorded


def refusal(call: RecordedCall, choice: Choice, target: Target) -> str | None:
    """Why a choice is not worth timing: it does not compile or fit, races, or spills in a loop; else None.

    Spills outside of loops are left to the timing: on sm_90 the largest tiles, 128 x 256 with 8 warps, have
    40 to 536 bytes of them in epilogues with GELU or a residual, and may be the fastest all the same.
    """
    from trm_kernels.ops import aot

    try:
        for launch in launches(call, choice, target):
            compiled = aot.inspect(_compiled(launch, target), target)
            if compiled.shared_memory > target.shared_memory:
                return f"takes {compiled.shared_memory} bytes of shared memory"
            if compiled.spills_in_loop:
                return f"spills in a loop, {compiled.stack} bytes a thread"
            if compiled.hazards:
                return f"would race: {compiled.hazards[0]}"
    except Exception as error:  # a compiler fails in many ways, and every one means: not this candidate
        return f"does not compile: {type(error).__name__}: {str(error)[:200]}"
    return None


def _compiled(launch: Launch, target: Target) -> Any:
    """Compile as a launch on the device would, so that Triton's cache on disk has it by then.

    A launch's own key differs from that of an ahead-of-time compilation, so it takes Triton's own path with
    a driver that only names the target.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    gpu = GPUTarget(target.kind, target.arch, 32 if target.kind == "cuda" else 64)

    class Named:
        def get_current_target(self) -> Any:
            return gpu

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    driver.set_active(Named())
    return launch.kernel.warmup(
        *launch.args, grid=(1,), **launch.constants, num_warps=launch.warps, num_stages=launch.stages
    )


#: What hides GPUs from a process. HIP takes an empty value for none at all (ROCm/hip issue 3001).
_HIDDEN = {"CUDA_VISIBLE_DEVICES": "-1", "HIP_VISIBLE_DEVICES": "-1"}


@contextmanager
def _gpus_hidden() -> Iterator[None]:
    """In processes that are started inside no GPU is visible.

    An import asks torch for the GPU, which would give each process a context on it, with memory that the
    timing lacks. And a spawned process imports its parent's main module before it calls any initializer.
    """
    before = {name: os.environ.get(name) for name in _HIDDEN}
    os.environ.update(_HIDDEN)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class ParallelCompiler:
    """Compiles candidates in worker processes; a context manager."""

    def __init__(self, workers: int | None = None) -> None:
        self._workers = workers or min(16, os.cpu_count() or 1)

    def __enter__(self) -> ParallelCompiler:
        # Spawned: a forked process may not touch CUDA after its parent did.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(self._workers, mp_context=context)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __call__(self, call: RecordedCall, choices: Sequence[Choice], target: Target) -> list[str | None]:
        with _gpus_hidden():  # a pool that spawns starts its processes as work is submitted
            waiting = [self._pool.submit(refusal, call, choice, target) for choice in choices]
        try:
            return [future.result() for future in waiting]
        except BrokenProcessPool as error:
            raise RuntimeError(f"a compiling process died ({error}); run the command again") from error
