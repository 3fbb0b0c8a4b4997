"""Comparison of originals and replacements on random inputs: the evidence for :func:`trm_kernels.patch`."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trm_kernels import backends
from trm_kernels.module import FusedModule
from trm_kernels.patching.match import (
    TOLERANCE,
    Mismatch,
    Site,
    Tables,
    neox_tables,
    parameter_names,
    require,
)
from trm_kernels.testing import ErrorPool

# The original's matrix products may run in TF32 on CUDA.
_TF32_TOLERANCE = 5e-3

_BATCH = 3
_LENGTH = 13


def probe_network(site: Site, fused: FusedModule, tables: Tables | None) -> str:
    """Compare outputs and gradients of a network and its replacement.

    Returns:
        The evidence for the report.

    Raises:
        Mismatch: If they differ, or if one of them cannot run.
    """
    like = next(fused.parameters())
    if like.device.type != "cpu" or like.dtype not in (torch.float32, torch.float64):
        # Rounding may hide a difference, so compare in float32 first ...
        _compare_networks(*_widened(site, fused, tables))
    # ... and then in the dtype in which they will run.
    return _evidence(_compare_networks(site, fused, tables))


def _widened(
    site: Site, fused: FusedModule, tables: Tables | None
) -> tuple[Site, FusedModule, Tables | None]:
    """Copy both to float32 on the CPU, ours on the eager backend, and recompute rounded RoPE tables."""
    network = copy.deepcopy(site.network).to("cpu", torch.float32)
    ours = copy.deepcopy(fused).to("cpu", torch.float32)
    ours.backend = "eager"
    like = next(ours.parameters())
    for module in network.modules():
        cached = module._buffers.get("cos_cached")
        if cached is not None:
            module.cos_cached, module.sin_cached = neox_tables(fused.config, cached.shape[0], like)
    if tables is not None and fused.config.rotary:
        tables = neox_tables(fused.config, tables[0].shape[0], like)
    return replace(site, network=network), ours, tables


def _compare_networks(site: Site, fused: FusedModule, tables: Tables | None) -> list[float]:
    x, injection = _random_inputs(site, fused, tables, count=2)

    def original(h: Tensor, mask: Tensor | None) -> Tensor:
        if site.family == "scratch":
            return functools.reduce(lambda out, block: block(out), site.blocks, h)
        if site.family == "paper":
            return site.network(hidden_states=h, input_injection=injection, cos_sin=tables)
        return site.network(h) if mask is None else site.network(h, mask=mask)

    def ours(h: Tensor, mask: Tensor | None) -> Tensor:
        if site.family == "paper":
            return fused(hidden_states=h, input_injection=injection, cos_sin=tables)
        return fused(h, mask)

    theirs, mine = _trainable(site.network), _trainable(fused)
    errors = []
    for training in _comparable_modes(fused):
        for mask in (None, _ragged_mask(x)) if site.family == "seed" else (None,):
            old = _Run(functools.partial(original, mask=mask), theirs)
            new = _Run(functools.partial(ours, mask=mask), mine)
            with _mode(site.network, training), _mode(fused, training):
                errors.append(_compare(old, new, [x], mask, training))
    return errors


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    named = sorted(module.named_parameters(remove_duplicate=False))
    return [parameter for _, parameter in named if parameter.requires_grad]


def probe_loop(site: Site, fused: FusedModule, original: Callable[..., Any], ours: Callable[..., Any]) -> str:
    """Compare two recursion methods of the owner. Both call the fused network, so only schedules can differ.

    Returns and raises the same as :func:`probe_network`.
    """
    owner, names = site.owner, parameter_names(ours)
    assert owner is not None
    inputs = _random_inputs(site, fused, None, count=sum(name in ("x", "y", "z") for name in names))
    options: dict[str, tuple[Any, ...]] = {
        "mask": (None, _ragged_mask(inputs[0])),
        "include_input": (True, False),
        "with_gradients": (True, False),
    }
    last = names[-1]
    errors = []
    for training in _comparable_modes(fused):
        for given in [{last: option} for option in options[last]] if last in options else [{}]:
            old = _Run(functools.partial(original, **given))
            new = _Run(functools.partial(ours, **given))
            with _mode(owner, training), _eager(fused):
                errors.append(_compare(old, new, inputs, given.get("mask"), training))
    return _evidence(errors)


def _evidence(errors: list[float]) -> str:
    return f"equal on the probe, error {max(errors):.1e}"


def _comparable_modes(fused: FusedModule) -> tuple[bool, ...]:
    # Without dropout, training mode must be deterministic too; comparing it reveals training-only behaviour.
    return (False, True) if fused.config.dropout == 0.0 else (False,)


@contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Put a module into training or evaluation mode, then restore the mode of every submodule."""
    before = [(child, child.training) for child in module.modules()]
    module.train(training)
    try:
        yield
    finally:
        for child, mode in before:
            child.training = mode


@contextmanager
def _eager(fused: FusedModule) -> Iterator[None]:
    """Run a network and its blocks on the eager backend."""
    before = [(module, module.backend) for module in fused.modules() if isinstance(module, FusedModule)]
    for module, _ in before:
        module.backend = "eager"
    try:
        yield
    finally:
        for module, backend in before:
            module.backend = backend


def _random_inputs(site: Site, fused: FusedModule, tables: Tables | None, count: int) -> list[Tensor]:
    """Inputs [B, L, D] of unit scale, except one sample so small that a different epsilon shows."""
    length = fused.config.seq_len or getattr(site.owner, "seq_len", None)
    if tables is not None:
        length = tables[0].shape[0]
    if not isinstance(length, int):
        length = _LENGTH
    like = next(fused.parameters())
    generator = torch.Generator().manual_seed(0)
    shape = (count, _BATCH, length, fused.config.d_model)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x[:, -1] *= max(1e-3, 8.0 * torch.finfo(like.dtype).tiny ** 0.5)  # its squares must not underflow
    return list(x.to(like.device, like.dtype))


def _ragged_mask(x: Tensor) -> Tensor:
    """Return a mask [B, L]: a full row, one with a gap (1..1 0..0 1) and one padded on the left."""
    mask = torch.ones(x.shape[:2], device=x.device)
    mask[1, x.shape[1] // 3 : -1] = 0
    mask[2, : x.shape[1] // 2] = 0
    return mask


@dataclass(frozen=True)
class _Run:
    """A function of the inputs, and the parameters whose gradients are compared."""

    function: Callable[..., Any]
    parameters: Sequence[nn.Parameter] = ()

    def evaluate(self, inputs: list[Tensor], mask: Tensor | None) -> dict[str, list[Tensor]]:
        """Compute outputs at valid positions, and the gradients of inputs and parameters."""
        with torch.inference_mode(False), torch.enable_grad():
            leaves = [x.clone().requires_grad_() for x in inputs]
            returned = self.function(*leaves)
            outputs = [returned] if isinstance(returned, Tensor) else list(returned)
            if mask is not None:
                outputs = [out.masked_fill(mask[..., None] == 0, 0.0) for out in outputs]
            attached = [out for out in outputs if out.requires_grad]
            if not attached:
                return {"outputs": outputs, "gradients": []}
            directions = [torch.linspace(-1, 1, out.numel()).view_as(out).to(out) for out in attached]
            wanted = [*leaves, *self.parameters]
            found = torch.autograd.grad(attached, wanted, directions, allow_unused=True)
        gradients = [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]
        return {"outputs": outputs, "gradients": gradients}


def _compare(old: _Run, new: _Run, inputs: list[Tensor], mask: Tensor | None, training: bool) -> float:
    """Return the larger of the relative Frobenius errors of outputs and gradients."""
    device, dtype, shape = inputs[0].device, inputs[0].dtype, list(inputs[0].shape)
    mode = "training" if training else "eval"
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            expected = old.evaluate(inputs, mask)
        except Exception as error:  # any failure means that we do not know this model
            first_line = str(error).strip().partition("\n")[0]
            raise Mismatch(
                f"the original fails on a probe {shape}: {type(error).__name__}: {first_line}"
            ) from error
        try:
            actual = new.evaluate(inputs, mask)
        except backends.BackendError as error:
            raise Mismatch(f"on a probe {shape}, {error}") from error
    tf32 = device.type == "cuda" and dtype is torch.float32
    tolerance = _TF32_TOLERANCE if tf32 else TOLERANCE[dtype]
    errors = []
    for kind in ("outputs", "gradients"):
        shapes, known = ([list(t.shape) for t in side[kind]] for side in (actual, expected))
        require(shapes == known, f"{kind} have shapes {shapes} instead of {known} in {mode} mode")
        pool = ErrorPool()
        for tensor, truth in zip(actual[kind], expected[kind], strict=True):
            pool.add(tensor, truth)
        found = f"{kind} differ on the probe by {pool.error:.1e} (relative, {dtype}, {mode} mode)"
        require(pool.error <= tolerance, f"{found}, more than the tolerance {tolerance:.0e}")
        errors.append(pool.error)
    return max(errors)
