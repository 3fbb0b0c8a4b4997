"""Ahead-of-time compilation of recorded launches, which checks GPU code without a GPU.

It needs a process without ``TRITON_INTERPRET=1``, which disables the compiler.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from trm_kernels.ops._launch import Launch, Target
from trm_kernels.ops.hazards import hazards

_POINTER = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.bool: "*u1",
}


@dataclass(frozen=True)
class Compiled:
    """Properties of one compiled launch.

    Attributes:
        shared_memory: Bytes of shared memory per program.
        stack: Bytes of stack per thread for spilled registers (CUDA only; 0 elsewhere). Even at 48 of 255
            registers, ptxas stores one or two pointers there that are used once, so a small stack does not
            indicate register pressure.
        spills_in_loop: Whether a loop accesses that stack, which is what costs time.
        registers: Registers per thread (CUDA only; 0 elsewhere).
        wgmma: Whether the PTX contains Hopper's warp-group matrix instructions.
        hazards: Patterns that the compiler is known to pipeline incorrectly.
    """

    shared_memory: int
    stack: int
    spills_in_loop: bool
    registers: int
    wgmma: bool
    hazards: tuple[str, ...]


def _source(launch: Launch) -> ASTSource:
    """Return the kernel with the signature and specialisations of the real launch."""
    kernel = launch.kernel
    signature: dict[str, str] = {}
    constants: dict[str, Any] = dict(launch.constants)
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    names = kernel.arg_names
    for i, (name, arg) in enumerate(zip(names, launch.args, strict=False)):
        if arg is None or (isinstance(arg, int) and arg == 1):
            signature[name], constants[name] = "constexpr", arg
        elif isinstance(arg, Tensor):
            signature[name] = _POINTER[arg.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(arg, int):
            signature[name] = "i32" if -(2**31) <= arg < 2**31 else "i64"
            if arg % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    for name in launch.constants:
        signature[name] = "constexpr"
    ordered = {name: signature[name] for name in names}
    return ASTSource(kernel, ordered, constexprs=constants, attrs=attributes)


def compile_launch(launch: Launch, target: Target) -> Compiled:
    """Compile one launch for ``target``."""
    gpu = GPUTarget(target.kind, target.arch, 32 if target.kind == "cuda" else 64)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    return inspect(triton.compile(_source(launch), target=gpu, options=options), target)


def inspect(compiled: Any, target: Target) -> Compiled:
    """Return the properties of a kernel that was compiled for ``target``."""
    shared = compiled.metadata.shared
    found = tuple(hazards(compiled.asm["ttir"]))
    if target.kind != "cuda":
        return Compiled(shared, stack=0, spills_in_loop=False, registers=0, wgmma=False, hazards=found)
    registers, stack, in_loop = _resources(compiled.asm["cubin"])
    return Compiled(shared, stack, in_loop, registers, "wgmma.mma_async" in compiled.asm["ptx"], found)


def _resources(cubin: bytes) -> tuple[int, int, bool]:
    """Return registers per thread, bytes of spill stack per thread, and whether a loop accesses it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
        registers = re.search(r"REG:(\d+)", usage)
        stack = re.search(r"STACK:(\d+)", usage)
        assert registers is not None and stack is not None, usage
        if int(stack[1]) == 0:
            return int(registers[1]), 0, False
        accesses, loops = _local_accesses(_cuobjdump("-sass", file.name))
    in_loop = any(first <= access <= last for access in accesses for first, last in loops)
    # A kernel may have a stack frame that no instruction accesses.
    return int(registers[1]), int(stack[1]) if accesses else 0, in_loop


def _local_accesses(sass: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the addresses of local-memory loads and stores, and the address range of every loop."""
    accesses, loops = [], []
    for address_text, instruction in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", sass):
        address = int(address_text, 16)
        if re.search(r"\b(STL|LDL)\b", instruction):
            accesses.append(address)
        branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", instruction)
        if branch is not None and int(branch[1], 16) < address:
            loops.append((int(branch[1], 16), address))
    return accesses, loops


def _cuobjdump(option: str, path: str) -> str:
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([program, option, path], check=True, capture_output=True, text=True).stdout
