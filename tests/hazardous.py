"""Compile two kernels that contain the patterns of :mod:`trm_kernels.ops.hazards`, and search for them.

Run as a script, in a process without ``TRITON_INTERPRET=1``; prints the findings, one JSON line per kernel.
"""

from __future__ import annotations

import json

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from trm_kernels.ops.hazards import hazards


@triton.jit
def squares_of_an_operand(a_ptr, b_ptr, c_ptr, K):
    i = tl.arange(0, 64)
    acc = tl.zeros((64, 64), tl.float32)
    sumsq = tl.zeros((64,), tl.float32)
    for start in range(0, K, 64):
        a = tl.load(a_ptr + i[:, None] * K + start + i[None, :])
        b = tl.load(b_ptr + i[None, :] * K + start + i[:, None])
        acc = tl.dot(a, b, acc)
        sumsq += tl.sum(a.to(tl.float32) * a.to(tl.float32), axis=1)
    tl.store(c_ptr + i[:, None] * 64 + i[None, :], acc * sumsq[:, None])


@triton.jit
def running_sum(a_ptr, K):
    i = tl.arange(0, 64)
    for row in range(1, K):
        before = tl.load(a_ptr + (row - 1) * 64 + i)
        tl.store(a_ptr + row * 64 + i, tl.load(a_ptr + row * 64 + i) + before)


def main() -> None:
    operands = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32", "K": "i32"}
    for kernel, signature in (
        (squares_of_an_operand, operands),
        (running_sum, {"a_ptr": "*fp32", "K": "i32"}),
    ):
        source = ASTSource(kernel, signature, constexprs={}, attrs={})
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        print(json.dumps(hazards(compiled.asm["ttir"])))


if __name__ == "__main__":
    main()
