"""The C++ functions neither write nor read outside their buffers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.native.common import INSTRUCTION_SETS, MIXERS, kernels_of, network
from trm_kernels import TinyRecursiveNetwork, native_module, reference
from trm_kernels.backends import native

#: Floats before and after each buffer; the first is a cache line, because torch aligns its allocations.
BEFORE, AFTER = 16, 48


class Buffers:
    """Tensors between canaries.

    Args:
        canary: Value around them.
        filling: Their initial value.
    """

    def __init__(self, canary: float, filling: float) -> None:
        self.canary, self.filling = canary, filling
        self.whole: list[Tensor] = []

    def take(self, *shape: int) -> Tensor:
        size = math.prod(shape)
        whole = torch.full((BEFORE + size + AFTER,), self.canary)
        whole[BEFORE : BEFORE + size] = self.filling
        self.whole.append(whole)
        return whole[BEFORE : BEFORE + size].view(shape)

    def copy(self, of: Tensor) -> Tensor:
        return self.take(*of.shape).copy_(of)

    def check(self) -> None:
        for whole in self.whole:
            around = torch.cat((whole[:BEFORE], whole[-AFTER:]))
            assert torch.equal(around, torch.full_like(around, self.canary))


def run(
    net: TinyRecursiveNetwork,
    name: str,
    lengths: tuple[int, ...],
    *,
    n: int,
    recompute: bool,
    threads: int,
    canary: float,
    filling: float,
) -> dict[str, Tensor]:
    """Run pack, forward and backward of a recursion with buffers of exactly the reported sizes."""
    config = net.config
    module, kernels = native_module.module(), kernels_of(config, name)
    buffers = Buffers(canary, filling)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return buffers.copy(scale * torch.randn(shape, generator=generator))

    def address(tensor: Tensor | None) -> int:
        return 0 if tensor is None else tensor.data_ptr()

    rows, d = sum(lengths), config.d_model
    starts = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    cos = sin = None
    if config.rotary:
        tables = reference.rotary_tables(max(lengths), config.head_dim, 10000.0, starts.float())
        cos, sin = (buffers.copy(table) for table in tables)
    batch = module.Batch(rows, len(lengths), starts.data_ptr(), address(cos), address(sin), 0)
    x, y, z, dy_out, dz_out = (random(rows, d) for _ in range(5))
    norm = random(d) if config.pre_norm else None
    recursion = module.Recursion(
        n,
        *(address(t) for t in (x if n else None, y, z, norm)),
        1e-6 if config.pre_norm else -1.0,
        0.2 if config.pre_norm and config.mixer == "attention" else 0.0,
        12345,
        recompute,
    )
    call = native._Call(net, (torch.zeros(1, max(lengths), d),), None, (None, None), False)
    shapes = [None if tensor is None else tensor.shape for tensor in call.block_tensors(call.parameters)]
    parameters = [None if shape is None else random(*shape, scale=shape[-1] ** -0.5) for shape in shapes]
    gradients = [None if shape is None else buffers.take(*shape) for shape in shapes]

    alone = buffers.take(kernels.packed_size(False))
    packed = buffers.take(kernels.packed_size(True))
    for backward, to in ((False, alone), (True, packed)):
        kernels.pack([address(p) for p in parameters], backward, to.data_ptr(), threads)
        buffers.check()

    found: dict[str, Tensor] = {}
    for keeps, weights in ((False, alone), (True, packed)):
        workspace = buffers.take(kernels.workspace_size(batch, recursion, False, threads))
        kept = buffers.take(kernels.kept_size(batch, recursion)) if keeps else None
        y_out, z_out = buffers.take(rows, d), buffers.take(rows, d) if n else None
        pointers = [address(t) for t in (weights, kept, workspace, y_out, z_out)]
        kernels.forward(batch, recursion, *pointers, threads)
        buffers.check()
        found |= {f"y {keeps}": y_out} | ({} if z_out is None else {f"z {keeps}": z_out})

    workspace = buffers.take(kernels.workspace_size(batch, recursion, True, threads))
    dx, dy, dz = (buffers.take(rows, d) for _ in range(3))
    norm_gradient = None if norm is None else buffers.take(d)
    given = (dz_out, dx) if n else (None, None)
    pointers = [address(t) for t in (packed, kept, workspace, dy_out, *given, dy, dz)]
    kernels.backward(
        batch,
        recursion,
        [address(p) for p in parameters],
        *pointers,
        [address(g) for g in gradients],
        address(norm_gradient),
        threads,
    )
    buffers.check()
    named = {"dy": dy, "dz": dz, "norm": norm_gradient} | ({"dx": dx} if n else {})
    named |= {f"parameter {i}": gradient for i, gradient in enumerate(gradients)}
    return found | {name: tensor for name, tensor in named.items() if tensor is not None}


#: Threads, width, heads, lengths.
SIZES: dict[str, tuple[int, int, int, tuple[int, ...]]] = {
    "one of everything": (1, 2, 1, (1,)),
    "odd": (3, 18, 3, (7, 1, 0, 13)),
    "whole vectors": (1, 64, 2, (32, 16)),
    "many rows": (4, 20, 2, (170, 0, 257, 101)),
    "a product in two parts": (2, 132, 3, (5, 12)),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("family", MIXERS)
def test_buffers_are_as_large_as_the_sizes_say(family: str, name: str, size: str) -> None:
    threads, width, heads, lengths = SIZES[size]
    longest = max(lengths)
    if "tokens" in family:
        lengths = (longest,) * 3
    net = network(family, width, heads, layers=2, length=longest)
    for n, recompute in ((0, False), (2, False), (2, True)):
        results = [
            run(
                net,
                name,
                lengths,
                n=n,
                recompute=recompute,
                threads=threads,
                canary=canary,
                filling=filling,
            )
            for canary, filling in ((-12345.0, 0.0), (3e38, math.nan))
        ]
        for key, value in results[0].items():
            assert value.isfinite().all(), key
            assert torch.equal(value, results[1][key]), f"{key} depends on uninitialised memory"
        assert torch.equal(results[0]["y False"], results[0]["y True"])
