"""Latent recursions for the tests of the op: one problem for both the kernels and the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trm_kernels import NetworkConfig, reference
from trm_kernels.backends.fused import block_parameters
from trm_kernels.config import Memory
from trm_kernels.ops.layouts import LAYOUTS
from trm_kernels.ops.recursion import AuxiliaryTensors, Settings, recursion
from trm_kernels.packing import Packing

LENGTH, WIDTH, HEADS = 5, 8, 2
#: Attention mixes the valid positions of a sample; token mixers accept no mask.
ATTENTION = tuple(layout for layout in LAYOUTS if not layout.endswith("tokens"))
OUTPUT_EPS = 1e-5


def make_network(
    layout: str, dtype: torch.dtype, device: str, width: int = WIDTH, layers: int = 2
) -> reference.TinyRecursiveNetwork:
    """Build a network with random norms and biases, because initial ones and zeros would hide errors."""
    family, _, tokens = layout.partition("-")
    config = NetworkConfig(width, layers, HEADS, family=family, mixer=tokens or "attention", seq_len=LENGTH)
    net = reference.TinyRecursiveNetwork(config)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
            if family == "paper":
                parameter.mul_(0.5)  # otherwise the minimum of 256 inner units saturates over 5 tokens
    return net.to(device, dtype)


def holes(device: str) -> Tensor:
    """Return a mask with gaps, a sample without a valid position, and 1..1 0..0 1 (``SequenceTRM``)."""
    rows = [[0, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 0, 0, 1]]
    return torch.tensor(rows, dtype=torch.bool, device=device)


@dataclass(frozen=True)
class Problem:
    """One latent recursion over states [B, L, D]; with n = 0, a call ``net(y + z)``."""

    net: reference.TinyRecursiveNetwork
    layout: str
    n: int
    mask: Tensor | None = None
    output_norm: bool = False
    memory: Memory = "fast"
    packed: bool = False
    operand: torch.dtype | None = None

    def leaves(self, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
        """Return all tensors that have gradients, by name: states, output norm's weight, parameters."""
        batch, width = 2 if self.mask is None else self.mask.shape[0], self.net.config.d_model
        states = torch.randn(3, batch, LENGTH, width, dtype=dtype, device=device).unbind()
        leaves = dict(zip("xyz", (state.clone() for state in states), strict=True))
        if self.n == 0:
            del leaves["x"]
        if self.output_norm:
            leaves["weight"] = 1.0 + 0.3 * torch.randn(width, dtype=dtype, device=device)
        for layer, block in enumerate(self.net.layers):
            for place, parameter in enumerate(block_parameters(block)):
                leaves[f"{layer}.{place}"] = parameter.detach().to(dtype, copy=True)
        return leaves

    def ours(self, leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Compute the new y and z (only y if n is 0) with the op, with zeros at masked positions."""
        arguments, packing = self.arguments(leaves)
        states = [leaves.get(name) for name in "xyz"]
        if packing is not None:
            states = [None if state is None else packing.pack(state) for state in states]
        y, z = recursion(*states, *arguments)
        found = (y,) if self.n == 0 else (y, z)
        return found if packing is None else tuple(packing.unpack(state) for state in found)

    def arguments(self, leaves: dict[str, Tensor]) -> tuple[tuple[Any, ...], Packing | None]:
        """Return the op's arguments after the states."""
        config, y = self.net.config, leaves["y"]
        batch, length, _ = y.shape
        packing = Packing.of(self.mask) if self.packed and self.mask is not None else None
        tensors = AuxiliaryTensors()
        if packing is not None:
            tensors = tensors._replace(starts=packing.starts, row_count=packing.count)
        elif self.mask is not None:
            tensors = tensors._replace(mask=self.mask.to(torch.uint8))
        if config.rotary:
            cos, sin = reference.rotary_tables(length, config.head_dim, config.rope_theta, y)
            if packing is not None:
                cos, sin = cos[packing.positions()], sin[packing.positions()]
            tensors = tensors._replace(cos=cos, sin=sin)
        parameters = [leaf for name, leaf in leaves.items() if name[0].isdigit()]
        settings = Settings(
            self.layout,
            self.n,
            config.n_heads,
            batch,
            length,
            config.norm_eps,
            OUTPUT_EPS if self.output_norm else None,
            0.0,
            y.dtype if self.operand is None else self.operand,
            self.memory,
        )
        return (parameters, [], leaves.get("weight"), *tensors, *settings), packing

    def truth(self, leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Compute the same with the reference, differentiable in every leaf."""
        names = {id(parameter): name for name, parameter in self.net.named_parameters()}
        parameters = {}
        for layer, block in enumerate(self.net.layers):
            for place, parameter in enumerate(block_parameters(block)):
                parameters[names[id(parameter)]] = leaves[f"{layer}.{place}"]

        def call(h: Tensor) -> Tensor:
            out = torch.func.functional_call(self.net, parameters, (h, self.mask))
            if self.output_norm:
                out = nn.functional.rms_norm(out, out.shape[-1:], leaves["weight"], OUTPUT_EPS)
            return out

        x, y, z = (leaves.get(name) for name in "xyz")
        assert y is not None and z is not None
        if x is None:
            return (call(y + z),)
        return reference.latent_recursion(call, x, y, z, self.n)

    def with_memory(self, memory: Memory) -> Problem:
        return replace(self, memory=memory)


def _weights(out: tuple[Tensor, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    drawn = [torch.randn(found.shape, generator=generator, dtype=torch.float64) for found in out]
    return [weight.to(found.device, found.dtype) for weight, found in zip(drawn, out, strict=True)]


def project(out: tuple[Tensor, ...]) -> Tensor:
    """Return the scalar that :func:`results_and_gradients` differentiates."""
    return torch.stack([(w * found).sum() for w, found in zip(_weights(out), out, strict=True)]).sum()


def results_and_gradients(
    function: Callable[[dict[str, Tensor]], tuple[Tensor, ...]], leaves: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return outputs of ``function`` and gradients of all leaves, for fixed output gradients."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    out = function(leaves)
    torch.autograd.backward(out, _weights(out))
    results = {f"output {i}": found.detach() for i, found in enumerate(out)}
    for name, leaf in leaves.items():
        assert leaf.grad is not None, f"{name} received no gradient"
        results[name] = leaf.grad
    return results
