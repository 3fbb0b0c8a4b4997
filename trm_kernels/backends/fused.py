"""The ``triton`` backend: networks and recursions as chains of kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trm_kernels import ops, prepared
from trm_kernels.backends import checks, rotary
from trm_kernels.backends.checks import block_parameters, layout_name, operand_dtype, output_norm_of
from trm_kernels.backends.registry import Backend, FusedRecursion, Recursion
from trm_kernels.module import FusedModule
from trm_kernels.packing import Packing, read_positions


def _matrices(
    module: FusedModule, parameters: list[Tensor], layout: str, operand: torch.dtype, *, fp8: bool
) -> list[Tensor]:
    """Return the matrices that the kernels read: prepared in every call, or once for a frozen network.

    A call cannot detect whether the weights have changed since matrices were prepared: reading all of them on
    the device and waiting for the answer would take longer than folding them again.
    """
    from trm_kernels.ops.layouts import LAYOUTS, prepare

    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return []  # launches cannot be traced, and tensors may hold no data: the op prepares them itself

    def make() -> list[Tensor]:
        with torch.no_grad():
            return prepare(LAYOUTS[layout], parameters, operand, fp8=fp8)

    kept = prepared.matrices(module, parameters, (operand, fp8), make)
    return make() if kept is None else kept


class _Call:
    """One network, applied to states of one shape and dtype."""

    def __init__(
        self,
        module: FusedModule,
        like: Tensor,
        n: int,
        mask: Tensor | None = None,
        packing: Packing | None = None,
    ) -> None:
        from trm_kernels.ops.attention_common import mask_ends
        from trm_kernels.ops.recursion import AuxiliaryTensors, Settings

        config = module.config
        self.module = module
        self.device = like.device
        self.parameters = [parameter for block in module.blocks for parameter in block_parameters(block)]
        batch, length, _ = like.shape
        cos = sin = ends = starts = count = None
        if packing is not None:
            batch, length, starts, count = packing.batch, packing.length, packing.starts, packing.count
        if config.rotary:
            cos, sin = rotary.tables(config, length, like)
            if packing is not None:
                positions = packing.positions()
                cos, sin = cos[positions], sin[positions]
        if mask is not None:
            mask = (mask != 0).to(torch.uint8).contiguous()
            ends = mask_ends(mask)
        self.tensors = AuxiliaryTensors(mask, ends, starts, count, cos, sin)
        self.settings = Settings(
            layout=layout_name(config),
            n=n,
            n_heads=config.n_heads,
            batch=batch,
            length=length,
            eps=config.norm_eps,
            output_eps=None,
            dropout=config.dropout if module.training else 0.0,
            operand=operand_dtype(like),
            memory="fast",
        )
        self._matrices: dict[bool, list[Tensor]] = {}

    def __call__(
        self,
        x: Tensor | None,
        y: Tensor,
        z: Tensor | None,
        output_weight: Tensor | None = None,
        *,
        read: Tensor | None = None,
        **overrides: Any,
    ) -> tuple[Tensor, Tensor]:
        """Run one latent recursion or, with n = 0, one network call; ``overrides`` replace settings."""
        from trm_kernels.ops.recursion import recursion

        settings = self.settings._replace(**overrides)
        tensors = self.tensors._replace(read=read)
        if settings.dropout > 0.0:
            tensors = tensors._replace(seed=torch.randint(2**62, (1,), device=self.device))
        fp8 = settings.fp8
        if fp8 not in self._matrices:
            self._matrices[fp8] = _matrices(
                self.module, self.parameters, settings.layout, settings.operand, fp8=fp8
            )
        return recursion(x, y, z, self.parameters, self._matrices[fp8], output_weight, *tensors, *settings)


def run(module: FusedModule, x: Tensor, mask: Tensor | None) -> Tensor:
    """Run a network or block on ``x`` [B, L, D] and ``mask`` [B, L]."""
    return _Call(module, x, 0, mask)(None, x, None)[0]


def run_recursion(module: FusedModule, states: Sequence[Tensor], request: Recursion) -> tuple[Tensor, Tensor]:
    """Run T - 1 latent recursions without gradients and one with, on states [B, L, D] of one dtype."""
    n, read = request.n, request.read
    packing = Packing.of(request.mask) if isinstance(request.mask, Tensor) else request.mask
    x, y, z = states
    given_z = z
    if packing is not None:
        x, y, z = packing.pack(x), packing.pack(y), packing.pack(z)
    network = _Call(module, y, n, packing=packing)
    weight, output_eps = output_norm_of(request)

    def records() -> bool:
        given = (x, y, z, weight, *network.parameters)
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)

    def recursion(y: Tensor, z: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        fp8 = request.precision == "fp8-nograd" and not records()
        new_y, new_z = network(
            x if n > 0 else None,
            y,
            z,
            weight,
            read=rows,
            output_eps=output_eps,
            memory=request.memory,
            fp8=fp8,
        )
        return new_y, z if n == 0 else new_z

    with torch.no_grad():
        for _ in range(request.T - 1):
            y, z = recursion(y, z)
    with torch.set_grad_enabled(request.with_gradients and torch.is_grad_enabled()):
        if read is None or records():
            y, z = recursion(y, z)
            y = y if packing is None else packing.unpack(y)
            y = y if read is None else read_positions(y, read)
        else:
            y, z = recursion(y, z, _rows_of(read, network.settings.length, packing))
            y = y.view(*read.shape, -1)
            if packing is not None:
                y = y.masked_fill(~packing.mask.gather(1, read)[..., None], 0.0)
        if n == 0:
            return y, given_z
        return y, z if packing is None else packing.unpack(z)


def _rows_of(read: Tensor, length: int, packing: Packing | None) -> Tensor:
    """Return the rows [B K] of positions ``read`` [B, K], among padded or packed rows."""
    first = torch.arange(read.shape[0], device=read.device)[:, None] * length
    rows = (first + read).reshape(-1)
    return rows if packing is None else packing.place[rows]


BACKEND = Backend(
    "triton",
    "fused Triton kernels",
    unavailable=lambda: ops.UNAVAILABLE,
    refuses=checks.refuses,
    run=run,
    recursion=FusedRecursion(checks.refuses_recursion, run_recursion),
    auto=("cuda",),
)
