"""Triton's interpreter with right numbers where its own are wrong.

It rounds float32 to bfloat16 by cutting bits off, and computes with the bit patterns of bfloat16, ``tl.dot``
included. It converts float32 to e4m3 half up, and loses the carry into every odd exponent: 124.01 becomes 64.
So do Triton 3.6, 3.7 and 3.9. ``tests/ops/test_mended_interpreter.py`` shows what comes out, and fails where
a mend no longer reaches what it should.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

#: What a ``TensorHandle`` holds. NumPy has no bfloat16: of that, bit patterns.
Array = np.ndarray[Any, Any]


def widen(bits: Array) -> Array:
    """Bit patterns of bfloat16 as float32: exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: Array) -> Array:
    """float32 as bit patterns of bfloat16: to nearest, ties to even, overflow to infinity, NaN to NaN."""
    bits = values.view(np.uint32).astype(np.uint64)  # room for the carry
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), bits >> 16 | 0x40, rounded).astype(np.uint16)


def install() -> None:
    """Mend the interpreter, and let the kernels take bfloat16 in it.

    Where Triton's internals have moved, nothing is mended, bfloat16 stays refused, and its tests fail.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    from trm_kernels import ops

    builder, reductions = interpreter.InterpreterBuilder, interpreter.ReduceScanOpInterface
    mends = [
        (interpreter, "_convert_float", _convert),
        (builder, "cast_impl", _cast),
        (builder, "create_dot", _in_float32),
        *((builder, name, _rounded) for name in ("unary_op", "binary_op", "ternary_op", "create_fma")),
        (reductions, "apply", _refused),
        (builder, "create_atomic_rmw", _refused),
    ]
    if not all(hasattr(place, name) for place, name, _ in mends):
        return
    for place, name, mend in mends:
        original = getattr(place, name)
        setattr(place, name, functools.wraps(original)(mend(original, interpreter)))
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
    """Casts between bfloat16 and anything go through float32, as PyTorch's do."""
    tl = interpreter.tl

    def cast(self: Any, source: Any, target: Any) -> Any:
        kinds = source.dtype.scalar, target.scalar
        if tl.bfloat16 in kinds and tl.float32 not in kinds:
            source = original(self, source, tl.float32)
        return original(self, source, target)

    return cast


def _in_float32(original: Callable[..., Any], interpreter: Any) -> Callable[..., Any]:
    """Operands of bfloat16 are widened: their products are exact in float32, where they are summed."""

    def run(self: Any, *arguments: Any) -> Any:
        return original(self, *(_widened(argument, interpreter) for argument in arguments))

    return run


def _rounded(original: Callable[..., Any], interpreter: Any) -> Callable[..., Any]:
    """Element by element in float32, rounded once, as GPUs do it; comparisons stay booleans."""
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
    """GPUs round at every step of a sum in bfloat16, in an order of their own; kernels sum in float32."""
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
    """Of handles and tensors; anything else, such as the function to apply, has no such dtype."""
    dtype = getattr(argument, "dtype", None)
    return isinstance(dtype, tl.dtype) and dtype.scalar == tl.bfloat16
