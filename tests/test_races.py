"""Races that only a GPU shows: an error that moves between runs on the same inputs.

Triton 3.6 to 3.9 pipeline two patterns wrongly on sm_90 (:mod:`trm_kernels.ops.hazards`); the shipped
kernels hold neither, and here they run often enough, at shapes that fill the chip, for a race to show.
"""

from __future__ import annotations

import pytest
import torch

from trm_kernels import TinyRecursiveNetwork, deep_recursion, use_backend
from trm_kernels.testing import relative_error

pytestmark = pytest.mark.gpu
REPEATS = 50


@pytest.mark.parametrize(
    ("shape", "family"),
    [
        ((32, 256, 256), "seed"),
        ((1, 256, 2048), "seed"),
        ((256, 97, 512), "paper"),
        ((64, 97, 512), "scratch"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_repeated_recursions_agree_to_the_bit(
    shape: tuple[int, int, int], family: str, dtype: torch.dtype, device: str
) -> None:
    net = TinyRecursiveNetwork(shape[-1], 2, 8, family=family).to(device, dtype)
    x, y, z = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    with torch.no_grad(), use_backend("triton"):
        first, _ = deep_recursion(net, x, y, z, 2, 2)
        for _ in range(REPEATS):
            again, _ = deep_recursion(net, x, y, z, 2, 2)
            assert torch.equal(first, again)
        one, _ = deep_recursion(net, x[:1], y[:1], z[:1], 2, 2)
    # Another grid of programs, another timing: only the order of sums may differ.
    assert relative_error(one, first[:1]) < (2e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("memory", ["fast", "balanced", "small"])
def test_repeated_training_steps_agree_to_the_bit(memory: str, device: str) -> None:
    net = TinyRecursiveNetwork(256, 2, 8, backend="triton").to(device, torch.bfloat16)
    x, y, z = (torch.randn(16, 256, 256, device=device, dtype=torch.bfloat16) for _ in range(3))
    mask = torch.arange(256, device=device) < torch.randint(80, 257, (16, 1), device=device)

    def gradients() -> list[torch.Tensor]:
        out, _ = deep_recursion(net, x, y, z, 2, 1, mask=mask, memory=memory)
        return list(torch.autograd.grad(out.float().square().mean(), list(net.parameters())))

    first = gradients()
    for _ in range(REPEATS // 5):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))
