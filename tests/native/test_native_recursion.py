"""Recursions on the ``native`` backend: the tolerance rule, and gradient flow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.backend_double import alter
from tests.native.common import (
    FAMILIES,
    INSTRUCTION_SETS,
    MIXERS,
    eager_of,
    hold_to_the_rule,
    instruction_set,
    lengths_mask,
    network,
    results,
    states,
    threads,
)
from trm_kernels import Packing, deep_recursion, latent_recursion, reference
from trm_kernels.backends import native

RAGGED = lengths_mask((31, 0, 1, 12), 31)
HOLES = torch.tensor([[0, 1, 0, 1, 1, 0], [1, 0, 0, 0, 1, 1]])


@pytest.fixture(autouse=True)
def _runs_natively(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail tests during which no complete recursion ran natively."""
    calls = []
    run_recursion = native.run_recursion

    def counting(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        calls.append(args)
        return run_recursion(*args, **options)

    alter(monkeypatch, "native", "recursion", run=counting)
    yield
    assert calls


def norm_of(kind: str, width: int) -> nn.Module | None:
    if kind == "none":
        return None
    if kind == "without weight":
        return nn.RMSNorm(width, elementwise_affine=False)
    norm = reference.RMSNorm(width, 1e-6) if kind == "reference" else nn.RMSNorm(width, eps=1e-6)
    nn.init.normal_(norm.weight, 1.0, 0.2)
    return norm


@pytest.mark.parametrize(
    ("n", "T", "masked"),
    [(0, 1, True), (1, 1, False), (3, 1, True), (1, 3, True), (3, 2, False), (0, 3, False)],
)
@pytest.mark.parametrize("family", MIXERS)
def test_schedules(family: str, n: int, T: int, masked: bool) -> None:
    if "paper" in family and n * T > 3:
        n = 2  # with random weights, more steps amplify rounding a thousandfold, in eager too
    mask = RAGGED if masked and "tokens" not in family else None
    hold_to_the_rule(family, 4, 31, n=n, T=T, mask=mask)


@pytest.mark.parametrize("kind", ["torch", "reference", "without weight"])
@pytest.mark.parametrize("family", ["seed", "scratch", "scratch-tokens"])
def test_output_norms(family: str, kind: str) -> None:
    mask = None if "tokens" in family else HOLES
    hold_to_the_rule(family, 2, 6, layers=2, n=2, T=2, mask=mask, norm=norm_of(kind, 40))


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("family", MIXERS)
def test_recomputed_calls_on_every_instruction_set(family: str, name: str) -> None:
    """On three threads. For the best set, test_native_determinism compares the bits to ``memory="fast"``."""
    norm = norm_of("none" if "paper" in family else "torch", 20)
    mask = None if "tokens" in family else RAGGED
    with instruction_set(name), threads(3):
        hold_to_the_rule(
            family, 4, 31, width=20, heads=1, layers=2, n=1, mask=mask, norm=norm, memory="small"
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_many_rows(family: str) -> None:
    """More rows than a thread's chunk and a weight gradient's depth, with sample boundaries anywhere."""
    mask = lengths_mask((170, 1, 257, 0, 180), 257)
    hold_to_the_rule(family, 5, 257, width=20, heads=1, n=1, mask=mask, seeds=4)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16(family: str) -> None:
    hold_to_the_rule(family, 4, 31, layers=2, n=2, T=2, mask=RAGGED, dtype=torch.bfloat16)


@pytest.mark.parametrize("masked", [False, True])
def test_positions_that_are_read(masked: bool) -> None:
    net, given = network(), states(2, 6)
    mask, read = HOLES if masked else None, torch.tensor([[4, 1], [0, 5]])
    runs = []
    for options in ({"read": read}, {}):
        net.zero_grad()
        leaves = [state.clone().requires_grad_() for state in given]
        y, z = latent_recursion(net, *leaves, 2, mask=mask, **options)  # type: ignore[arg-type]
        if not options:
            y = y.gather(1, read[..., None].expand(-1, -1, 16))
        (y.square().sum() + z.square().sum()).backward()
        runs.append([y, z, *(leaf.grad for leaf in (*leaves, *net.parameters()))])
    assert runs[0][0].shape == (2, 2, 16)
    for mine, theirs in zip(*runs, strict=True):
        assert torch.equal(mine, theirs)
    with torch.no_grad():
        y, _ = latent_recursion(net, *given, 2, mask=mask, read=read)
    assert torch.equal(y, runs[0][0])


def test_a_packing_is_its_mask() -> None:
    net, given = network(layers=2), states(4, 31)
    expected = results(net, None, given, n=1, T=1, mask=RAGGED)
    lengths = [31, 0, 1, 12]
    for packing in (
        Packing.of(RAGGED),
        Packing.of(RAGGED, rows=60),
        Packing.of(RAGGED, lengths=lengths),
        Packing.of(RAGGED, rows=44, lengths=lengths),
    ):
        found = results(net, None, given, n=1, T=1, mask=packing)
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
    hold_to_the_rule("scratch", 4, 31, n=1, mask=Packing.of(RAGGED, lengths=lengths))


@pytest.mark.parametrize("lengths", [[3, 3], [1, 1], [2, 499], [490, 500], [500, 500], [0, 0]])
def test_wrong_lengths_of_a_packing_are_ignored(lengths: list[int]) -> None:
    """The mask determines the valid positions, whatever lengths a Packing has."""
    mask = lengths_mask((500, 490), 500)
    net, given = network(), states(2, 500)
    with torch.no_grad():
        found = latent_recursion(net, *given, 1, mask=Packing.of(mask, lengths=lengths))
        expected = latent_recursion(net, *given, 1, mask=mask)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("n", [0, 2])
@pytest.mark.parametrize("memory", ["fast", "small"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_valid_positions_no_gradient_flows(family: str, packed: bool, memory: str, n: int) -> None:
    net, given = network(family), states(2, 6)
    mask: Any = torch.zeros(2, 6)
    if packed:
        mask = Packing.of(mask, lengths=[0, 0])
    norm = norm_of("none" if family == "paper" else "torch", 16)
    found = results(net, norm, given, n=n, T=2, mask=mask, memory=memory)
    assert not found["new y"].any() and (n == 0 or not found["new z"].any())
    for name in [*(name for name, _ in net.named_parameters()), "x", "y"]:
        assert name not in found or not found[name].any(), name
    x = given[0].clone().requires_grad_()
    net.zero_grad()
    net(x, torch.zeros(2, 6)).sum().backward()
    for gradient in (x.grad, *(parameter.grad for parameter in net.parameters())):
        assert gradient is not None and not gradient.any()


NORM_SCALE = "layers.0.norm2.weight"
CASES = ("y alone", "z alone", "frozen network", "frozen states", "one parameter", "x", "z", "output norm")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("memory", ["fast", "small"])
@pytest.mark.parametrize("case", CASES)
def test_only_tensors_that_require_gradients_get_one(case: str, memory: str, masked: bool) -> None:
    net, inputs = network(layers=2), states(2, 6)
    norm = nn.RMSNorm(16, eps=1e-6)
    asked = {"x": "x", "z": "z", "frozen states": "", "one parameter": "", "output norm": ""}.get(case, "xyz")
    runs = []
    for module in (net, eager_of(net)):
        norm.zero_grad()
        leaves = [
            state.clone().requires_grad_(name in asked) for name, state in zip("xyz", inputs, strict=True)
        ]
        alone = case in ("frozen network", "x", "z")
        for name, parameter in module.named_parameters():
            wanted = name == NORM_SCALE if case == "one parameter" else case != "output norm"
            parameter.requires_grad_(wanted and not alone)
        norm.requires_grad_(case != "one parameter" and not alone)
        y, z = latent_recursion(
            module, *leaves, 2, mask=HOLES if masked else None, output_norm=norm, memory=memory
        )
        loss = {"y alone": y, "z alone": z}.get(case)
        (y * z if loss is None else loss).square().sum().backward()
        runs.append([leaf.grad for leaf in (*leaves, *module.parameters(), *norm.parameters())])
    assert any(gradient is not None for gradient in runs[0])
    for mine, theirs in zip(*runs, strict=True):
        # Autograd returns None if no gradient flows; one node for a complete recursion may return zeros.
        theirs = torch.zeros_like(mine) if theirs is None and mine is not None else theirs
        assert (mine is None) == (theirs is None)
        if mine is not None:
            scale = max(1.0, theirs.abs().max().item())
            torch.testing.assert_close(mine, theirs, rtol=0.0, atol=1e-5 * scale)


@pytest.mark.parametrize("n", [0, 2])
def test_without_gradients(n: int) -> None:
    """With with_gradients=False, under no_grad, and if nothing requires gradients: equal states, no graph."""
    net, given = network(), states(2, 6)
    x = given[0].clone().requires_grad_()
    recorded = deep_recursion(net, x, *given[1:], n, 2)
    found = [deep_recursion(net, x, *given[1:], n, 2, with_gradients=False)]
    with torch.no_grad():
        found.append(deep_recursion(net, x, *given[1:], n, 2))
    net.requires_grad_(False)
    found.append(deep_recursion(net, *given, n, 2))
    assert recorded[0].requires_grad
    for states_found in found:
        for mine, theirs in zip(states_found, recorded, strict=True):
            assert not mine.requires_grad and torch.equal(mine, theirs)


def test_no_latent_step_leaves_z() -> None:
    net, (x, y, z) = network(), states(2, 6)
    new_y, new_z = latent_recursion(net, x, y, z, 0, mask=HOLES)
    torch.testing.assert_close(new_y, eager_of(net)(y + z, HOLES), rtol=1e-5, atol=1e-5)
    assert torch.equal(new_z[HOLES != 0], z[HOLES != 0])


def test_strides() -> None:
    """Transposed and strided states, a learned y [D] and z [1, 1, D] broadcast, a strided mask."""
    net = network("scratch")
    mask = HOLES.repeat_interleave(2, 1)[:, ::2]
    x = torch.randn(6, 2, 32)[..., ::2].transpose(0, 1)
    assert not x.is_contiguous() and not mask.is_contiguous()
    learned = torch.randn(16), torch.randn(1, 1, 16)
    direction = torch.randn(16, 6, 2).permute(2, 1, 0)
    runs = []
    for module in (net, eager_of(net)):
        y, z = (state.clone().requires_grad_() for state in learned)
        new_y, new_z = latent_recursion(module, x, y, z, 1, mask=mask)
        torch.autograd.backward((new_y, new_z), (direction, direction.expand_as(new_z)))
        runs.append((new_y, new_z, y.grad, z.grad))
    for mine, theirs in zip(*runs, strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        torch.testing.assert_close(mine, theirs, rtol=0.0, atol=1e-5 * max(1.0, theirs.abs().max().item()))


def test_an_expanded_gradient() -> None:
    """``sum`` passes an expanded gradient, in which all elements share one float."""
    net, given = network(), states(2, 6)
    runs = []
    for module in (net, eager_of(net)):
        leaves = [state.clone().requires_grad_() for state in given]
        y, z = latent_recursion(module, *leaves, 1)
        (y.sum() + 2.0 * z.sum()).backward()
        runs.append([leaf.grad for leaf in leaves])
    for mine, theirs in zip(*runs, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_views_whose_sign_is_a_flag() -> None:
    """The imaginary part of a conjugate shares its memory with the original, and sets a negative bit."""
    net = network()
    views = [torch.randn(2, 6, 16, dtype=torch.complex64).conj().imag for _ in range(3)]
    assert all(view.is_neg() for view in views)
    plain = [view.resolve_neg() for view in views]
    with torch.no_grad():
        for mask in (None, HOLES):
            assert torch.equal(net(views[0], mask), net(plain[0], mask))
            for mine, theirs in zip(
                latent_recursion(net, *views, 1, mask=mask),
                latent_recursion(net, *plain, 1, mask=mask),
                strict=True,
            ):
                assert torch.equal(mine, theirs)
    gradients = []
    for flagged in (True, False):
        x = plain[0].clone().requires_grad_()
        direction = torch._neg_view(plain[1]) if flagged else -plain[1]
        gradients.append(torch.autograd.grad(net(x), x, direction)[0])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("which", range(3))
def test_a_state_made_in_inference_mode_trains(which: int) -> None:
    """It cannot be saved for a backward, so the recursion runs step by step or on eager."""
    net, given = network(), states(2, 6)
    net.backend = "auto"
    expected = results(eager_of(net), None, given, n=1, T=1)
    with torch.inference_mode():
        given[which] = given[which].clone()
    leaves = [state if state.is_inference() else state.clone().requires_grad_() for state in given]
    net.zero_grad()
    y, z = latent_recursion(net, *leaves, 1)
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(y.shape, generator=generator, dtype=torch.float64).float() for _ in range(2)]
    torch.autograd.backward((y, z), directions)
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None
        scale = max(1.0, expected[name].abs().max().item())
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0.0, atol=1e-5 * scale)
    latent_recursion(net, *states(2, 6), 1)  # natively


def test_a_second_derivative_raises() -> None:
    """Also for a gradient penalty added to another loss, which would otherwise silently vanish."""
    net, (x, y, z) = network(), states(2, 6)
    x.requires_grad_()
    for out in (latent_recursion(net, x, y, z, 1)[0], net(x)):
        (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match=r"second derivative|once_differentiable"):
            (out.sum() + gradient.square().sum()).backward()


def test_gradients_accumulate_and_graphs_free_saved_tensors() -> None:
    net, given = network(), states(2, 6)
    once = results(net, None, given, n=1, T=1)
    leaves = [state.clone().requires_grad_() for state in given]
    y, z = latent_recursion(net, *leaves, 1)
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(y.shape, generator=generator, dtype=torch.float64).float() for _ in range(2)]
    torch.autograd.backward((y, z), directions, retain_graph=True)
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, 2.0 * once[name])
    torch.autograd.backward((y, z), directions)
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, 3.0 * once[name])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.backward((y, z), directions)
