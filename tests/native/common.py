"""Helpers for the tests of the ``native`` backend; importing it skips tests if the module is not compiled."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from trm_kernels import (
    NetworkConfig,
    Packing,
    TinyRecursiveNetwork,
    deep_recursion,
    native_module,
    prepared,
)
from trm_kernels.testing import SEEDS, ToleranceRule

if (_reason := native_module.unavailable()) is not None:
    pytest.skip(_reason, allow_module_level=True)

ROOT = Path(__file__).parents[2]
FAMILIES = ("seed", "scratch", "paper")
#: Including families whose blocks mix positions with an MLP, which accept no mask.
MIXERS = (*FAMILIES, "scratch-tokens", "paper-tokens")
INSTRUCTION_SETS = native_module.module().instruction_sets()
Named = dict[str, Tensor]


def network(
    family: str = "seed", width: int = 16, heads: int = 2, layers: int = 1, *, length: int = 5, **options: Any
) -> TinyRecursiveNetwork:
    """Build a network with random biases and norms; ``length`` is for token mixers."""
    family, _, mixer = family.partition("-")
    if mixer:
        options |= {"mixer": mixer, "seq_len": length}
    net = TinyRecursiveNetwork(width, layers, heads, family=family, backend="native", **options)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return net


def eager_of(net: TinyRecursiveNetwork) -> TinyRecursiveNetwork:
    eager = copy.deepcopy(net)
    eager.backend = "eager"
    return eager


def states(batch: int, length: int, width: int = 16, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, y and z [B, L, D]."""
    return [torch.randn(batch, length, width, dtype=dtype) for _ in range(3)]


def lengths_mask(lengths: tuple[int, ...], length: int) -> Tensor:
    """1 at the first positions of each sample [B, L]."""
    return (torch.arange(length) < torch.tensor(lengths)[:, None]).to(torch.float32)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Run every network on this instruction set. Each set has its own layout of packed weights."""

    def forget() -> None:
        native_module.network.cache_clear()
        prepared.forget()

    with mock.patch.dict(os.environ, {"TRM_NATIVE_ISA": name}):
        forget()
        yield
    forget()


def kernels_of(config: NetworkConfig, name: str) -> Any:
    with instruction_set(name):
        return native_module.network(config)


def results(net: TinyRecursiveNetwork, norm: nn.Module | None, given: list[Tensor], **options: Any) -> Named:
    """Return y, z and every gradient of a deep recursion; output gradients depend only on shapes."""
    leaves = [state.detach().clone().requires_grad_() for state in given]
    for module in (net, norm):
        if module is not None:
            module.zero_grad(set_to_none=True)
    out = deep_recursion(net, *leaves, output_norm=norm, **options)
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in out]
    torch.autograd.backward(out, directions)
    named = {"new y": out[0].detach(), "new z": out[1].detach()}
    gradients = dict(zip("xyz", (leaf.grad for leaf in leaves), strict=True))
    gradients |= {name: parameter.grad for name, parameter in net.named_parameters()}
    if norm is not None:
        gradients |= {f"norm.{name}": parameter.grad for name, parameter in norm.named_parameters()}
    return named | {name: gradient.clone() for name, gradient in gradients.items() if gradient is not None}


def add_all(rule: ToleranceRule, ours: Named, eager: Named, truth: Named) -> None:
    """Add the results of all three implementations for one seed."""
    largest = max(expected.norm().item() for expected in truth.values())
    for name, expected in truth.items():
        if expected.norm() <= 1e-12 * largest:  # zero except for rounding: queries and keys at length 1
            assert ours[name].norm() <= 1e-6 * largest, name
        else:
            rule.add(name, ours[name], eager[name], expected)


def hold_to_the_rule(
    family: str,
    batch: int,
    length: int,
    *,
    width: int = 40,
    heads: int = 2,
    layers: int = 1,
    mask: Tensor | Packing | None = None,
    norm: nn.Module | None = None,
    n: int = 0,
    T: int = 1,
    dtype: torch.dtype = torch.float32,
    seeds: int = SEEDS,
    network_options: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """Check outputs and gradients of recursions (n = 0: one call): native, eager, and eager in float64."""
    rule = ToleranceRule(dtype)
    for seed in range(seeds):
        torch.manual_seed(seed)
        net = network(family, width, heads, layers, length=length, **(network_options or {})).to(dtype)
        given = states(batch, length, width, dtype)
        options |= {"n": n, "T": T, "mask": mask}
        ours = results(net, norm, given, **options)
        eager = results(eager_of(net), norm, given, **options)
        wide = None if norm is None else copy.deepcopy(norm).double()
        truth = results(eager_of(net).double(), wide, [state.double() for state in given], **options)
        assert ours.keys() == truth.keys()
        add_all(rule, ours, eager, truth)
        valid = mask.mask if isinstance(mask, Packing) else mask
        if valid is not None:
            padding = valid == 0
            assert not ours["new y"][padding].any()
            assert n == 0 or not ours["new z"][padding].any()
    rule.check()


def run(code: str, timeout: float = 60.0, **environment: str) -> str:
    """Return the output of ``code`` in a separate Python process, which must write nothing to stderr."""
    process = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=timeout,
        env=os.environ | environment,
    )
    assert process.returncode == 0, process.stderr
    assert not process.stderr
    return process.stdout
