"""Patches for incorrect results of Triton's interpreter.

It rounds float32 to bfloat16 by truncation, and computes with the bit patterns of bfloat16, even in
``tl.dot``. It rounds halves up when it converts float32 to e4m3, and loses the carry into odd exponents:
124.01 becomes 64. This applies to Triton 3.6, 3.7 and 3.9. ``tests/ops/test_patched_interpreter.py`` checks
the results, and fails if a patch no longer takes effect.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

#: Data of a ``TensorHandle``. NumPy has no bfloat16, so its values are bit patterns.
Array = np.ndarray[Any, Any]


def widen(bits: Array) -> Array:
    """Convert bit patterns of bfloat16 to float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: Array) -> Array:
    """Round float32 to bit patterns of bfloat16: nearest, ties to even, overflow to infinity, NaN to NaN."""
    bits = values.view(np.uint32).astype(np.uint64)  # room for the carry
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), bits >> 16 | 0x40, rounded).astype(np.uint16)


def install() -> None:
    """Patch the interpreter, and allow the kernels to use bfloat16 in it.

    If Triton's internals have changed, nothing is patched, bfloat16 stays rejected, and its tests fail.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    from trm_kernels import ops

    builder, reductions = interpreter.InterpreterBuilder, interpreter.ReduceScanOpInterface
    patches = [
        (interpreter, "_convert_float", _convert),
        (builder, "cast_impl", _cast),
        (builder, "create_dot", _in_float32),
        *((builder, name, _rounded) for name in ("unary_op", "binary_op", "ternary_op", "create_fma")),
        (reductions, "apply", _refused),
        (builder, "create_atomic_rmw", _refused),
    ]
    if not all(hasattr(owner, name) for owner, name, _ in patches):
        return
    for owner, name, patch in patches:
        original = getattr(owner, name)
        setattr(owner, name, functools.wraps(original)(patch(original, interpreter)))
    if not hasattr(builder, "get_bf16"):  # Triton 3.9 has one
        builder.get_bf16 = lambda self, value: self.create_fp_trunc(
            self.get_fp32(value), interpreter.tl.bfloat16
        )
    ops.INTERPRETS_BFLOAT16 = True


def _convert(original: Callable[..., Any], interpreter: Any) -> Callable[..., Any]:
    tl, to_nearest = interpreter.tl, (None, interpreter._ir.ROUNDING_MODE.RTNE)

    def convert(data: Array, source: Any, target: Any, rounding: Any) -> Array:
        if source == tl.bfloat16 and target == tl.float32:
            return widen(data)
        if source == tl.float32 and rounding in to_nearest:
            if target == tl.bfloat16:
                return narrow(data)
            if target == tl.float8e4nv:
                return torch.from_numpy(data.copy()).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return original(data, source, target, rounding)

    return convert


def _cast(original: Callable[..., Any], interpreter: Any) -> Callable[..., Any]:
    """Convert between bfloat16 and other dtypes through float32, as PyTorch does."""
    tl = interpreter.tl

    def cast(self: Any, source: Any, target: Any) -> Any:
        kinds = source.dtype.scalar, target.scalar
        if tl.bfloat16 in kinds and tl.float32 not in kinds:
            source = original(self, source, tl.float32)
        return original(self, source, target)

    return cast


def _in_float32(original: Callable[..., Any], interpreter: Any) -> Callable[..., Any]:
    """Widen bfloat16 operands, whose products are exact in float32, and sum in float32."""

    def run(self: Any, *arguments: Any) -> Any:
        return original(self, *(_widened(argument, interpreter) for argument in arguments))

    return run


def _rounded(original: Callable[..., Any], interpreter: Any) -> Callable[..., Any]:
    """Compute elementwise in float32 and round once, as GPUs do; comparisons stay booleans."""
    tl, handle = interpreter.tl, interpreter.TensorHandle

    def run(self: Any, *arguments: Any) -> Any:
        wide = [_widened(argument, interpreter) for argument in arguments]
        out = original(self, *wide)
        if all(one is other for one, other in zip(arguments, wide, strict=True)):
            return out
        if out.data.dtype == np.bool_:
            return handle(out.data, tl.int1)
        return handle(narrow(out.data), tl.bfloat16)

    return run


def _refused(original: Callable[..., Any], interpreter: Any) -> Callable[..., Any]:
    """Reject bfloat16 sums: GPUs round at every step, in an unspecified order, so kernels sum in float32."""
    tl = interpreter.tl

    def run(self: Any, *arguments: Any) -> Any:
        flat = [one for it in arguments for one in (it if isinstance(it, tuple) else (it,))]
        if any(_is_bfloat16(argument, tl) for argument in flat):
            raise NotImplementedError("a reduction in bfloat16: widen to float32 first")
        return original(self, *arguments)

    return run


def _widened(argument: Any, interpreter: Any) -> Any:
    if _is_bfloat16(argument, interpreter.tl):
        return interpreter.TensorHandle(widen(argument.data), interpreter.tl.float32)
    return argument


def _is_bfloat16(argument: Any, tl: Any) -> bool:
    """Whether a handle or tensor is bfloat16; other arguments, such as functions, have no such dtype."""
    dtype = getattr(argument, "dtype", None)
    return isinstance(dtype, tl.dtype) and dtype.scalar == tl.bfloat16
