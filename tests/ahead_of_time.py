"""Compile every kernel configuration that the launchers choose, for targets that are not present.

Run as a script, in a process without ``TRITON_INTERPRET=1``; prints one JSON line per configuration.

    python tests/ahead_of_time.py sm_90         # or sm_90+tf32: configurations that TF32 changes
    python tests/ahead_of_time.py sm_90+core    # configurations of phase 2 and of the paper, bf16
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from trm_kernels import NetworkConfig, TinyRecursiveNetwork
from trm_kernels.backends.fused import block_parameters
from trm_kernels.ops import aot
from trm_kernels.ops._launch import TARGETS, Launch, Target, record
from trm_kernels.ops.attention import attention_forward
from trm_kernels.ops.attention_backward import attention_backward
from trm_kernels.ops.attention_common import Dropout, Heads, Samples
from trm_kernels.ops.dispatch import chosen_by
from trm_kernels.ops.recursion import (
    AuxiliaryTensors,
    Settings,
    _recursion,
    _recursion_backward,
    _recursion_saving,
)
from trm_kernels.ops.tiles import LIBRARY_KERNELS, Choice, Problem, heuristic

#: (B, L, D, H) of the regimes in docs/architecture.md; together they use every tile.
SHAPES = ((32, 256, 256, 8), (1, 256, 256, 8), (768, 96, 512, 8), (1, 256, 2048, 16))
#: Sudoku with 16 puzzle positions: a token mixer contracts over a length that no tile divides.
UNALIGNED = (768, 97, 512, 8)
#: Residual dtype and operand dtype. float16 compiles to the same code as bfloat16 except for conversions, so
#: it is compiled only where it differs: its norms are not folded.
PRECISIONS = (
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float32),
)
HEAD_SIZES = (16, 32, 64, 128, 256)


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def run_recursion(
    layout: str,
    shape: tuple[int, int, int, int],
    residual: torch.dtype,
    operand: torch.dtype,
    *,
    packed: bool = False,
    output_norm: bool = False,
) -> None:
    """Run forward and backward of a latent recursion with one latent step on tensors without data."""
    batch, length, width, heads = shape
    family, _, tokens = layout.partition("-")
    config = NetworkConfig(width, 2, heads, family=family, mixer=tokens or "attention", seq_len=length)
    with torch.device("meta"):
        net = TinyRecursiveNetwork.from_config(config).to(residual)
    parameters = [parameter for block in net.layers for parameter in block_parameters(block)]
    states = meta(batch, length, width, dtype=residual)
    positions = length
    starts = count = None
    if packed:
        states = meta(1, batch * length, width, dtype=residual)
        starts, count = meta(batch + 1, dtype=torch.int32), meta(1, dtype=torch.int32)
        positions = batch * length
    cos = meta(positions, config.head_dim // 2, dtype=torch.float32) if config.rotary else None
    tensors = AuxiliaryTensors(starts=starts, row_count=count, cos=cos, sin=cos)
    weight = meta(width, dtype=residual) if output_norm else None
    settings = Settings(
        layout,
        1,
        heads,
        batch,
        length,
        config.norm_eps,
        1e-6 if output_norm else None,
        0.0,
        operand,
        "balanced",
    )
    rest = parameters, [], weight, *tensors, *settings
    _recursion(states, states, states, *rest)
    out, _, saved = _recursion_saving(states, states, states, *rest)
    _recursion_backward(out, None, saved, True, True, *rest)


def run_attention(head_size: int, dtype: torch.dtype, everything: bool) -> None:
    """Run attention separately, plain or with mask, RoPE and dropout."""
    batch, length, n_heads = 2, 96, 4
    qkv = meta(batch, length, 3 * n_heads * head_size, dtype=dtype)
    heads = Heads(n_heads, Samples(batch, length))
    if everything:
        table = meta(length, head_size // 2, dtype=torch.float32)
        dropout = Dropout(0.1, meta(1, dtype=torch.int64))
        samples = Samples(
            batch, length, meta(batch, length, dtype=torch.uint8), meta(batch, dtype=torch.int32)
        )
        heads = Heads(n_heads, samples, table, table, dropout=dropout)
    out, lse = attention_forward(qkv, heads)
    attention_backward(out, qkv, out, lse, heads)


def shipped(target: Target) -> Iterator[Launch]:
    """Yield one launch of every configuration: kernel, constants, dtypes, warps and stages."""
    return _distinct(target, lambda: _record_everything(target))


def core(target: Target) -> Iterator[Launch]:
    """Yield the configurations of the most used recursions."""
    return _distinct(target, _record_core)


def _distinct(target: Target, run: Callable[[], None]) -> Iterator[Launch]:
    with record(target) as launches:
        run()
    seen = set()
    for launch in launches:
        key = describe(launch)
        if key not in seen:
            seen.add(key)
            yield launch


def tf32(target: Target) -> Iterator[Launch]:
    """Yield the float32 configurations that TF32 changes."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    return (launch for launch in shipped(target) if launch.constants.get("PRECISION") == "tf32")


def run_fp8(shape: tuple[int, int, int, int]) -> None:
    """Run a latent recursion without gradients, with products in fp8."""
    batch, length, width, heads = shape
    for family in ("seed", "paper"):
        config = NetworkConfig(width, 1, heads, family=family)
        with torch.device("meta"):
            net = TinyRecursiveNetwork.from_config(config).to(torch.bfloat16)
        states = meta(batch, length, width, dtype=torch.bfloat16)
        settings = Settings(
            family, 1, heads, batch, length, config.norm_eps, None, 0.0, torch.bfloat16, "fast", fp8=True
        )
        _recursion(
            states, states, states, block_parameters(net.layers[0]), [], None, *AuxiliaryTensors(), *settings
        )


def run_library() -> None:
    """Run only the epilogues, after library products, including float32 epilogues for 16-bit operands."""

    def library(problem: Problem, target: Target) -> Choice:
        choice = heuristic(problem, target)
        return replace(choice, route="library") if problem.kernel in LIBRARY_KERNELS else choice

    with chosen_by(library):
        run_recursion("seed", SHAPES[3], torch.bfloat16, torch.bfloat16)
        run_recursion("seed", SHAPES[3], torch.float32, torch.bfloat16)
        run_recursion("paper-tokens", UNALIGNED, torch.bfloat16, torch.bfloat16)


def _record_core() -> None:
    for family, shape in (("seed", SHAPES[0]), ("paper", SHAPES[2])):
        run_recursion(family, shape, torch.bfloat16, torch.bfloat16)


def _record_everything(target: Target) -> None:
    """Run every launcher at the shapes and dtypes above."""
    for shape in (SHAPES[0], SHAPES[3]):
        for residual, operand in PRECISIONS:
            run_recursion("seed", shape, residual, operand)
    for shape in (SHAPES[1], SHAPES[2]):
        run_recursion("seed", shape, torch.bfloat16, torch.bfloat16)
    for residual, operand in PRECISIONS:
        run_recursion("paper", SHAPES[2], residual, operand)
    run_recursion("scratch", SHAPES[2], torch.bfloat16, torch.bfloat16)
    for layout in ("scratch-tokens", "paper-tokens"):
        run_recursion(layout, UNALIGNED, torch.bfloat16, torch.bfloat16)
    run_recursion("seed", SHAPES[0], torch.float16, torch.float16)
    for residual, operand in PRECISIONS[:2]:
        run_recursion("seed", SHAPES[0], residual, operand, packed=True, output_norm=True)
    run_recursion("scratch", SHAPES[2], torch.bfloat16, torch.bfloat16, packed=True)
    run_library()
    if target.kind == "cuda" and isinstance(target.arch, int) and target.arch >= 90:
        for shape in (SHAPES[0], SHAPES[3]):
            run_fp8(shape)
    for head_size in HEAD_SIZES:
        for dtype in (torch.bfloat16, torch.float32):
            for everything in (False, True):
                run_attention(head_size, dtype, everything)


def describe(launch: Launch) -> str:
    """Return a description that identifies a configuration independent of sizes."""
    dtypes = [str(arg.dtype)[6:] for arg in launch.args if isinstance(arg, torch.Tensor)]
    constants = " ".join(f"{name}={value}" for name, value in launch.constants.items())
    name = launch.kernel.__name__
    return f"{name} {','.join(dtypes)} {constants} warps={launch.warps} stages={launch.stages}"


#: Selections after the ``+`` of a target.
SELECTIONS: dict[str, Callable[[Target], Iterator[Launch]]] = {"": shipped, "tf32": tf32, "core": core}


def main(names: list[str]) -> None:
    for name in names:
        target_name, _, selection = name.partition("+")
        target = TARGETS[target_name]
        for launch in SELECTIONS[selection](target):
            compiled = aot.compile_launch(launch, target)
            operand = next(arg for arg in launch.args if isinstance(arg, torch.Tensor))
            row = {
                "target": target_name,
                "configuration": describe(launch),
                "kernel": launch.kernel.__name__,
                "product": "BLOCK_K" in launch.constants and not launch.constants.get("PRODUCT", False),
                "operand": str(operand.dtype),
                "shared_memory": compiled.shared_memory,
                "limit": target.shared_memory,
                "stack": compiled.stack,
                "spills_in_loop": compiled.spills_in_loop,
                "registers": compiled.registers,
                "wgmma": compiled.wgmma,
                "hazards": compiled.hazards,
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
