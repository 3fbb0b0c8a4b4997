"""The recursion op: formulas in float64, registration, determinism, precision modes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.common import FLOAT64, launched
from tests.ops.recursions import (
    ATTENTION,
    LENGTH,
    WIDTH,
    Problem,
    holes,
    make_network,
    project,
    results_and_gradients,
)
from trm_kernels.backends.fused import block_parameters
from trm_kernels.config import Memory
from trm_kernels.ops import chain_backward
from trm_kernels.ops._launch import input_precision
from trm_kernels.ops.gemm import Outputs, gemm
from trm_kernels.ops.layouts import LAYOUTS
from trm_kernels.ops.mlp import mlp
from trm_kernels.ops.recursion import recursion

pytestmark = pytest.mark.interpreter
in_float64 = pytest.mark.skipif(FLOAT64 is None, reason="kernels run in float64 only in the interpreter")


def problem(
    layout: str,
    n: int,
    *,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    packed: bool | None = None,
    width: int = WIDTH,
    layers: int = 2,
    **options: Any,
) -> Problem:
    """Build a recursion over packed samples, or padded ones for token mixers, which cannot pack."""
    packed = layout in ATTENTION if packed is None else packed
    mask = holes(device) if packed else None
    net = make_network(layout, dtype, device, width, layers)
    options.setdefault("output_norm", LAYOUTS[layout].pre_norm)
    return Problem(net, layout, n, mask, packed=packed, **options)


def agree(ours: dict[str, Tensor], truth: dict[str, Tensor], bound: float) -> None:
    """Compare relative to each tensor's largest value: the gradient of the keys' bias is pure rounding."""
    assert ours.keys() == truth.keys()
    for name, expected in truth.items():
        atol = bound * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(
            ours[name], expected, rtol=0.0, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


@in_float64
@pytest.mark.parametrize(
    ("layout", "n", "memory"),
    [
        ("seed", 2, "fast"),
        ("seed", 0, "balanced"),
        ("scratch", 1, "small"),
        ("scratch-tokens", 2, "balanced"),
        ("paper", 2, "balanced"),
        ("paper-tokens", 0, "small"),
    ],
)
def test_the_gradient_is_the_derivative_of_the_forward(layout: str, n: int, memory: Memory) -> None:
    """gradcheck along one direction of all inputs, which takes two passes instead of minutes."""
    case = problem(layout, n, memory=memory, layers=1)
    leaves = case.leaves(torch.float64, "cpu")
    directions = {name: torch.randn_like(leaf) for name, leaf in leaves.items()}
    with launched("gemm_kernel", "weight_gradient_kernel"):
        found = results_and_gradients(case.ours, leaves)
    slope = sum((found[name] * directions[name]).sum() for name in leaves)

    def along(step: float) -> Tensor:
        moved = {name: leaf + step * directions[name] for name, leaf in leaves.items()}
        return project(case.ours(moved))

    step = 1e-6
    torch.testing.assert_close(slope, (along(step) - along(-step)) / (2 * step), rtol=1e-6, atol=1e-6)


@in_float64
@pytest.mark.parametrize("memory", ["balanced", "small"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_gradient_is_that_of_the_reference(layout: str, memory: Memory) -> None:
    """Compare each tensor, while gradcheck compares one sum; packed samples against padded ones."""
    case = problem(layout, 2, memory=memory)
    leaves = case.leaves(torch.float64, "cpu")
    truth = results_and_gradients(case.truth, leaves)
    ours = results_and_gradients(case.ours, leaves)
    if case.mask is not None:
        assert not any(ours[name][~case.mask].any() for name in ("output 0", "output 1", "x", "y", "z"))
        for found in (truth, ours):
            for name in ("output 0", "output 1", "x", "y", "z"):
                found[name] = found[name][case.mask]
    agree(ours, truth, 1e-9)


@in_float64
@pytest.mark.parametrize("calls", [1, 2])
def test_weight_gradients_in_chunks_equal_those_without(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of one call, and of two with a remainder, which would reveal a wrong slot of the workspace."""
    case = problem("scratch", 2, packed=False, layers=1, output_norm=False)
    leaves = case.leaves(torch.float64, "cpu")
    whole = results_and_gradients(case.ours, leaves)
    monkeypatch.setattr(chain_backward, "_chunk", lambda *_: calls)
    with launched("weight_gradient_kernel"):
        agree(results_and_gradients(case.ours, leaves), whole, 1e-12)


@in_float64
def test_a_masked_call_equals_the_reference() -> None:
    """A single call of the network with unpacked padding."""
    case = replace(problem("seed", 0), packed=False)
    leaves = case.leaves(torch.float64, "cpu")
    agree(results_and_gradients(case.ours, leaves), results_and_gradients(case.truth, leaves), 1e-9)


def test_a_mask_and_latent_steps_are_refused(device: str) -> None:
    """A norm at the end of a masked call would lose the input of the next call."""
    case = replace(problem("paper", 1, dtype=torch.float32, device=device), packed=False)
    with pytest.raises(ValueError, match="pack"):
        case.ours(case.leaves(torch.float32, device))


def test_latent_steps_require_x(device: str) -> None:
    case = problem("seed", 1, dtype=torch.float32, device=device, packed=False)
    leaves = case.leaves(torch.float32, device)
    del leaves["x"]
    with pytest.raises(ValueError, match="x"):
        case.ours(leaves)


@pytest.mark.parametrize(
    ("layout", "n", "memory"),
    [("seed", 1, "fast"), ("scratch", 0, "balanced"), ("scratch-tokens", 1, "small"), ("paper", 1, "small")],
)
def test_opcheck(layout: str, n: int, memory: Memory, device: str) -> None:
    case = problem(layout, n, dtype=torch.float32, device=device, layers=1, memory=memory)
    leaves = {name: leaf.requires_grad_() for name, leaf in case.leaves(torch.float32, device).items()}
    arguments, packing = case.arguments(leaves)
    states = [leaves.get(name) for name in "xyz"]
    if packing is not None:
        states = [None if state is None else packing.pack(state).detach() for state in states]
    # aot_dispatch would compare the bits of unused packed rows.
    utils = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if packing is None:
        utils.append("test_aot_dispatch_static")
    torch.library.opcheck(recursion, (*states, *arguments), test_utils=utils)


@pytest.mark.parametrize("layout", ["seed", "paper-tokens"])
def test_two_backward_passes_are_bitwise_equal(layout: str, device: str) -> None:
    case = problem(layout, 1, dtype=torch.float32, device=device, layers=1, packed=False)
    leaves = case.leaves(torch.float32, device)
    first, second = (results_and_gradients(case.ours, leaves) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@in_float64
@pytest.mark.parametrize("layout", ["seed", "scratch-tokens", "paper"])
def test_strides_of_parameters_and_states_do_not_matter(layout: str) -> None:
    case = problem(layout, 1, packed=False, layers=1)
    leaves = case.leaves(torch.float64, "cpu")
    expected = results_and_gradients(case.ours, leaves)
    strided = {
        name: torch.stack((leaf, leaf + 1), dim=1)[:, 0] if leaf.dim() == 1 else leaf.mT.contiguous().mT
        for name, leaf in leaves.items()
    }
    assert not any(leaf.is_contiguous() for leaf in strided.values())
    agree(results_and_gradients(case.ours, strided), expected, 1e-12)


def test_an_unnormalised_stream_beyond_float16_is_normalised_before_it_is_rounded(device: str) -> None:
    case = problem("seed", 0, dtype=torch.float32, device=device, packed=False)
    case = replace(case, operand=torch.float16, output_norm=False)
    leaves = case.leaves(torch.float32, device)
    leaves["y"] *= 1e6
    (ours,), (truth,) = case.ours(leaves), case.truth(leaves)
    torch.testing.assert_close(ours, truth, rtol=1e-2, atol=1e-2)


def test_backward_may_run_under_another_autocast_state(device: str) -> None:
    case = problem("seed", 0, dtype=torch.float32, device=device, packed=False, layers=1)
    leaves = case.leaves(torch.float32, device)

    def gradient(autocast: bool) -> Tensor:
        leaf = leaves["y"].clone().requires_grad_()
        (out,) = case.ours({**leaves, "y": leaf})
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            out.sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    assert torch.equal(gradient(True), gradient(False))


def test_every_parameter_of_every_family_is_read(device: str) -> None:
    for layout in LAYOUTS:
        net = make_network(layout, torch.float32, device)
        flat = {id(tensor) for block in net.layers for tensor in block_parameters(block)}
        assert flat == {id(parameter) for parameter in net.parameters()}, layout


def test_the_newer_precision_setting_is_followed() -> None:
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    try:
        settings.fp32_precision = "tf32"
        assert input_precision(torch.float32) == "tf32"
        assert input_precision(torch.float16) == "ieee"
        settings.fp32_precision = "ieee"
        assert input_precision(torch.float32) == "ieee"
    finally:
        settings.fp32_precision = before


@in_float64
@pytest.mark.parametrize("layout", ["seed", "scratch", "paper"])
def test_mlp_formula_passes_gradcheck(layout: str) -> None:
    (block,) = make_network(layout, torch.float64, "cpu", layers=1).layers
    count = {"seed": 5, "scratch": 4, "paper": 2}[layout]
    mask = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.uint8)
    x = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64, requires_grad=True)
    parameters = [parameter.detach().requires_grad_() for parameter in block_parameters(block)[-count:]]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return mlp(x, list(parameters), mask, layout, block.config.norm_eps, torch.float64)

    assert torch.autograd.gradcheck(function, (x, *parameters), fast_mode=True, check_undefined_grad=False)
    assert function(x, *parameters)[mask == 0].eq(0).all()


@pytest.mark.parametrize("layout", ["seed", "paper"])
def test_mlp_opcheck(layout: str, device: str) -> None:
    (block,) = make_network(layout, torch.float32, device, layers=1).layers
    x = torch.randn(2, LENGTH, WIDTH, device=device, requires_grad=True)
    parameters = block_parameters(block)[-{"seed": 5, "paper": 2}[layout] :]
    torch.library.opcheck(mlp, (x, parameters, None, layout, block.config.norm_eps, torch.float32))


def test_a_gemm_writes_no_row_beyond_the_count(device: str) -> None:
    a, weight = torch.randn(1, 70, 8, device=device), torch.randn(5, 8, device=device)
    places = {name: torch.full((1, 70, 5), 7.0, device=device) for name in ("out", "next", "copy", "pre")}
    sums = torch.full((70, 1), 7.0, device=device)
    gemm(
        a,
        weight,
        out_dtype=torch.float32,
        addend=torch.zeros(1, 70, 5, device=device),
        count=torch.tensor([66], dtype=torch.int32, device=device),
        outputs=Outputs(**places, sumsq=sums, copy_dtype=torch.float32, write_sumsq=True, save_pre=True),
    )
    for name, place in places.items():
        torch.testing.assert_close(place[:, :66], (a @ weight.t())[:, :66], msg=name)
        assert place[:, 66:].eq(7.0).all(), name
    torch.testing.assert_close(sums[:66, 0], places["out"][0, :66].square().sum(1))
    assert sums[66:].eq(7.0).all()
