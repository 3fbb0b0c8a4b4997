"""Launching, counting and recording of kernels, and properties of the target device."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from trm_kernels.ops import INTERPRET


@dataclass(frozen=True)
class Target:
    """Device properties that launchers need to choose tiles.

    Attributes:
        kind: ``"cuda"``, ``"hip"`` or ``"interpreter"``.
        arch: Compute capability times ten (90 for Hopper), or the gfx name.
        processors: Number of streaming multiprocessors.
        shared_memory: Maximum bytes of shared memory per program.
        name: Device name, which selects tables of measurements; empty for a compile-only target.
    """

    kind: str
    arch: int | str
    processors: int
    shared_memory: int
    name: str = ""

    @property
    def interpreted(self) -> bool:
        return self.kind == "interpreter"


#: Targets for which the tests compile all configurations ahead of time. The shared memory of sm_120 is that
#: of consumer Blackwell, and also of sm_86 and sm_89.
TARGETS = {
    "sm_80": Target("cuda", 80, 108, 163 * 1024),
    "sm_90": Target("cuda", 90, 132, 227 * 1024),
    "sm_100": Target("cuda", 100, 148, 227 * 1024),
    "sm_120": Target("cuda", 120, 170, 99 * 1024),
    "gfx942": Target("hip", "gfx942", 304, 64 * 1024),
}
_INTERPRETER = Target("interpreter", 0, 1, 1 << 30)


@dataclass(frozen=True)
class Launch:
    """One recorded launch, with everything needed to compile the kernel ahead of time."""

    kernel: Any
    args: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int
    stages: int


#: Number of launches by kernel name since the process started; tests assert on differences.
LAUNCHES: Counter[str] = Counter()

_recorder: Callable[[Launch], None] | None = None
_target_override: Target | None = None


@contextmanager
def record(target: Target) -> Iterator[list[Launch]]:
    """Record launches for ``target`` instead of running them (use ``meta`` tensors)."""
    global _recorder, _target_override
    launches: list[Launch] = []
    _recorder, _target_override = launches.append, target
    try:
        yield launches
    finally:
        _recorder = _target_override = None


@functools.cache
def _device_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        arch = properties.gcnArchName.split(":")[0]
        return Target("hip", arch, properties.multi_processor_count, 64 * 1024, properties.name)
    return Target(
        "cuda",
        10 * properties.major + properties.minor,
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,  # type: ignore[attr-defined] # missing in torch's stubs
        properties.name,
    )


def target_of(tensor: Tensor) -> Target:
    """Return the target for which kernels on this tensor are compiled."""
    if _target_override is not None:
        return _target_override
    return _INTERPRETER if INTERPRET else _device_target(tensor.device.index)


def input_precision(dtype: torch.dtype) -> str:
    """Return the input precision of ``tl.dot``; float32 follows torch's setting for matrix products."""
    # This getter also reflects set_float32_matmul_precision; the older getter raises once the new one is set.
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    # Only one AMD GPU supports TF32, and the compiler rejects the option for the others.
    return "tf32" if allowed and torch.version.hip is None else "ieee"


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """Return the accumulator dtype: float32, or float64 for gradcheck in the interpreter."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, warps: int, stages: int = 1, **constants: Any
) -> None:
    """Run ``kernel`` on the device of its first tensor argument."""
    if _recorder is not None:
        _recorder(Launch(kernel, args, constants, warps, stages))
        return
    with torch.cuda.device_of(next(arg for arg in args if isinstance(arg, Tensor))):
        kernel[grid](*args, **constants, num_warps=warps, num_stages=stages)
    LAUNCHES[kernel.__name__] += 1


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int, minimum: int = 1) -> int:
    """Return the smallest power of two that is at least ``n`` and ``minimum``."""
    return max(minimum, 1 << (n - 1).bit_length() if n > 0 else 1)
