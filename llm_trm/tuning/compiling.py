"""Compiles candidates before timing them, in parallel processes without a GPU."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from llm_trm.errors import InputError
from llm_trm.tuning.calls import RecordedCall, empty
from trm_kernels.ops._launch import Launch, Target, record
from trm_kernels.ops.dispatch import chosen_by
from trm_kernels.ops.tiles import Choice

#: ``compile(call, choices, target)``: for each choice, the reason not to time it, or None.
Compiler = Callable[[RecordedCall, Sequence[Choice], Target], list[str | None]]


def launches(call: RecordedCall, choice: Choice, target: Target) -> list[Launch]:
    """The kernels that the call launches with a choice."""
    with record(target) as recorded, chosen_by(lambda problem, _: choice):
        call.prepare(empty)()
    return recorded


def refusal(call: RecordedCall, choice: Choice, target: Target) -> str | None:
    """The reason not to time a choice (it does not compile or fit, races, or spills in a loop), or None.

    Spills outside of loops are allowed: on sm_90 the largest tiles, 128 x 256 with 8 warps, spill 40 to 536
    bytes in epilogues with GELU or a residual, and may still be the fastest.
    """
    from trm_kernels.ops import aot

    try:
        for launch in launches(call, choice, target):
            compiled = aot.inspect(_compiled(launch, target), target)
            if compiled.shared_memory > target.shared_memory:
                return f"needs {compiled.shared_memory} bytes of shared memory"
            if compiled.spills_in_loop:
                return f"spills in a loop, {compiled.stack} bytes per thread"
            if compiled.hazards:
                return f"would race: {compiled.hazards[0]}"
    except Exception as error:  # any compiler failure excludes the candidate
        return f"does not compile: {type(error).__name__}: {str(error)[:200]}"
    return None


def _compiled(launch: Launch, target: Target) -> Any:
    """Compile as a launch on the device would, to fill Triton's disk cache.

    A launch's cache key differs from the key of an ahead-of-time compilation, so this uses Triton's launch
    path with a driver that only names the target.
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


#: Environment variables that hide GPUs. HIP treats an empty value as unset (ROCm/hip issue 3001).
_HIDDEN = {"CUDA_VISIBLE_DEVICES": "-1", "HIP_VISIBLE_DEVICES": "-1"}


@contextmanager
def _gpus_hidden() -> Iterator[None]:
    """Hide GPUs from processes that start inside the block.

    An import queries the GPU through torch, which would create a context in each process and take memory
    from the timing. A pool initializer is too late, since a spawned process first imports its parent's main
    module.
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
    """A context manager that compiles candidates in worker processes."""

    def __init__(self, workers: int | None = None) -> None:
        self._workers = workers or min(16, os.cpu_count() or 1)

    def __enter__(self) -> ParallelCompiler:
        # Spawn, because a forked process cannot use CUDA if its parent did.
        context = multiprocessing.get_context("spawn")
        # Ctrl-C reaches the whole group of processes; this one ends the others.
        self._pool = ProcessPoolExecutor(
            self._workers,
            mp_context=context,
            initializer=signal.signal,
            initargs=(signal.SIGINT, signal.SIG_IGN),
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __call__(self, call: RecordedCall, choices: Sequence[Choice], target: Target) -> list[str | None]:
        with _gpus_hidden():  # a pool that spawns starts its processes on submission
            waiting = [self._pool.submit(refusal, call, choice, target) for choice in choices]
        try:
            return [future.result() for future in waiting]
        except BrokenProcessPool as error:
            raise InputError(f"a compiler process died ({error}): run the command again") from error
