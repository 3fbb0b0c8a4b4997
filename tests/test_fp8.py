"""Recursions in fp8: the kernels compared to their emulation, unsupported calls, and separate caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.fp8 import emulation
from bench.fp8.emulation import EmulatedNetwork, product, quantise_rows
from tests.ops.common import launched
from trm_kernels import BackendError, TinyRecursiveNetwork, deep_recursion, latent_recursion
from trm_kernels.testing import ToleranceRule, relative_error

FAMILIES = ("seed", "scratch", "paper")
WIDTH, HEADS, BATCH, LENGTH = 32, 2, 2, 6


def network(family: str, device: str, *, layers: int = 2) -> TinyRecursiveNetwork:
    net = TinyRecursiveNetwork(WIDTH, layers, HEADS, family=family, backend="triton").to(device).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # otherwise norms are ones and biases zeros
    return net


def states(device: str) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(BATCH, LENGTH, WIDTH).to(device) for _ in range(3))  # type: ignore[return-value]


def exact_rows(rows: int, device: str) -> Tensor:
    """Return small integers up to 448 / 32, with rows scaled by powers of two, which need no rounding."""
    values = torch.randint(-8, 9, (rows, WIDTH)).float()
    values[:, 0] = 14.0
    return (values * 2.0 ** torch.randint(-3, 4, (rows, 1)).float()).to(device)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="fp8 needs sm_90"
)
class TestKernels:
    pytestmark = pytest.mark.interpreter

    @pytest.mark.parametrize("eps", [None, 1e-5])
    def test_rows_that_need_no_rounding(self, device: str, eps: float | None) -> None:
        from trm_kernels.ops.quantise import quantise_rows as kernel

        x, column = exact_rows(9, device), 2.0 ** torch.randint(0, 2, (WIDTH,)).float().to(device)
        x[3] = 0.0
        column[0] = 2.0
        with launched("quantise_rows_kernel"):
            values, scale = kernel(x, column=column, eps=eps)
        expected = quantise_rows(x, column=column, eps=eps)
        assert torch.equal(values.float(), expected.values)
        torch.testing.assert_close(scale[:, None], expected.scale, rtol=1e-6, atol=0.0)
        if eps is None:
            assert torch.equal(values.float() * scale[:, None], x * column)

    def test_a_product_that_needs_no_rounding(self, device: str) -> None:
        from trm_kernels.ops.gemm import gemm
        from trm_kernels.ops.quantise import quantise_rows as kernel

        a, weight = exact_rows(9, device), exact_rows(16, device)
        (qa, sa), (qw, sw) = kernel(a), kernel(weight)
        with launched("gemm_kernel"):
            out = gemm(qa[None], qw, scales=(sa, sw), out_dtype=torch.float32).out
        assert out is not None
        assert torch.equal(out[0], a @ weight.t())
        assert torch.equal(product(quantise_rows(a), quantise_rows(weight)), a @ weight.t())

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_complete_recursion(self, family: str, device: str) -> None:
        net, (x, y, z) = network(family, device), states(device)
        norm = torch.nn.RMSNorm(WIDTH).to(device) if family == "seed" else None
        arguments: dict[str, Any] = {"n": 1, "T": 2, "output_norm": norm}
        with torch.no_grad():
            with launched("quantise_rows_kernel"):
                found = deep_recursion(net, x, y, z, precision="fp8-nograd", **arguments)
            emulated = deep_recursion(EmulatedNetwork(net), x, y, z, **arguments)
            full = deep_recursion(net, x, y, z, **arguments)
        for one, other, exact in zip(found, emulated, full, strict=True):
            # In rare cases, the last bit of a sum determines to which e4m3 neighbour a value rounds.
            assert relative_error(one, other) < 0.1 * relative_error(one, exact)
            assert relative_error(one, exact) > 1e-3

    @pytest.mark.parametrize("autocast", [False, True])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_in_bfloat16_it_is_as_accurate_as_its_emulation(
        self, family: str, autocast: bool, device: str
    ) -> None:
        """By the tolerance rule; the truth is the emulation in float32."""
        rule = ToleranceRule(torch.bfloat16)
        held = torch.float32 if autocast else torch.bfloat16
        for seed in range(2):
            torch.manual_seed(seed)
            net = network(family, device)
            if family == "paper":
                # Otherwise post-norm amplifies the rounding to fp8 until half of the result is noise.
                with torch.no_grad():
                    for parameter in net.parameters():
                        parameter.mul_(0.5)
            net, inputs = net.to(held), [state.to(held) for state in states(device)]
            context = torch.autocast(device, torch.bfloat16, enabled=autocast)
            with torch.no_grad(), context, launched("quantise_rows_kernel"):
                found = latent_recursion(net, *inputs, 1, precision="fp8-nograd")
                emulated = latent_recursion(EmulatedNetwork(net), *inputs, 1)
            with torch.no_grad():
                wide = [state.float() for state in inputs]
                truth = latent_recursion(EmulatedNetwork(net.float()), *wide, 1)
            for name, *results in zip("yz", found, emulated, truth, strict=True):
                rule.add(name, *results)
        rule.check()

    def test_gradients_are_those_of_full_precision(self, device: str) -> None:
        net, (x, y, z) = network("seed", device, layers=1), states(device)
        found = []
        for precision in (None, "fp8-nograd"):
            net.zero_grad()
            with launched("gemm_kernel"):
                new_y, _ = latent_recursion(net, x, y, z, 1, precision=precision)
            new_y.square().mean().backward()
            found.append([new_y, *(p.grad.clone() for p in net.parameters() if p.grad is not None)])
        assert len(found[0]) == 1 + len(list(net.parameters()))
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))

    def test_in_training_only_the_first_recursions_are_in_fp8(self, device: str) -> None:
        net, (x, y, z) = network("seed", device, layers=1), states(device)
        found = deep_recursion(net, x, y, z, 1, 2, precision="fp8-nograd")
        with torch.no_grad():
            middle = latent_recursion(net, x, y, z, 1, precision="fp8-nograd")
        expected = latent_recursion(net, x, *middle, 1)
        for one, other in zip(found, expected, strict=True):
            assert one.requires_grad
            assert torch.equal(one, other)

    def test_the_op_refuses_a_gradient(self, device: str) -> None:
        from trm_kernels.backends.fused import _Call

        net, (_, y, _) = network("seed", device, layers=1), states(device)
        with pytest.raises(RuntimeError, match="has no gradient"):
            _Call(net, y, 0)(None, y, None, fp8=True)

    def test_matrices_of_each_precision_are_separate(self, device: str) -> None:
        net, (x, y, z) = network("seed", device, layers=1), states(device)

        def run(precision: Any) -> Tensor:
            with torch.no_grad():
                return latent_recursion(net, x, y, z, 1, precision=precision)[0]

        full, fp8 = run(None), run("fp8-nograd")
        assert not torch.equal(full, fp8)
        assert torch.equal(run(None), full)
        assert torch.equal(run("fp8-nograd"), fp8)


@pytest.mark.parametrize("backend", ["eager", "compile"])
def test_other_backends_refuse(backend: str, device: str) -> None:
    net = TinyRecursiveNetwork(WIDTH, 1, HEADS, backend=backend).to(device)
    with pytest.raises(BackendError, match=f"fp8-nograd.*{backend}"):
        deep_recursion(net, *states(device), 1, 2, precision="fp8-nograd")


def test_a_foreign_network_refuses(device: str) -> None:
    with pytest.raises(BackendError, match="Linear is not a network of this package"):
        deep_recursion(
            torch.nn.Linear(WIDTH, WIDTH).to(device), *states(device), 1, 1, precision="fp8-nograd"
        )


def test_an_unknown_precision_is_an_error(device: str) -> None:
    net = TinyRecursiveNetwork(WIDTH, 1, HEADS).to(device)
    with pytest.raises(ValueError, match="'fp4'"):
        deep_recursion(net, *states(device), 1, 1, precision="fp4")  # type: ignore[arg-type]


def test_the_emulation_refuses_token_mixers() -> None:
    net = TinyRecursiveNetwork(WIDTH, 1, family="paper", mixer="tokens", seq_len=LENGTH)
    with pytest.raises(ValueError, match="token mixer"):
        EmulatedNetwork(net)


def test_rounding_is_to_nearest_even_and_saturates() -> None:
    values = torch.tensor([17.0, 19.0, 17.1, 448.0, 2.0**-10, 1.5 * 2.0**-9])
    expected = torch.tensor([16.0, 20.0, 18.0, 448.0, 0.0, 2.0**-8])
    assert torch.equal(emulation.round_to_fp8(values), expected)
    row = torch.randn(64, 128)
    error = relative_error(quantise_rows(row).values * quantise_rows(row).scale, row)
    assert 0.015 < error < 0.035
