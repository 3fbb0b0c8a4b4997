"""Networks whose class computes something other than its configuration: every backend calls it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trm_kernels import BackendError, TinyRecursiveNetwork, TransformerBlock, deep_recursion
from trm_kernels.graphs import graphed

BACKENDS = ("auto", "eager", "triton", "native")


class OwnForward(TinyRecursiveNetwork):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return 0.5 * super().forward(x, mask) + 1


class OwnCall(TinyRecursiveNetwork):
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return 0.5 * super().__call__(*args, **kwargs) + 1


class Mixin:
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return 0.5 * super().forward(x, mask) + 1  # type: ignore[misc]


class Mixed(Mixin, TinyRecursiveNetwork):
    pass


class Grandchild(Mixed):
    pass


class OwnEager(TinyRecursiveNetwork):
    def forward_eager(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return 0.5 * super().forward_eager(x, mask) + 1


class FewerBlocks(TinyRecursiveNetwork):
    @property
    def blocks(self) -> Any:
        return super().blocks[:1]

    def forward_eager(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.layers[0](x, None if mask is None else mask != 0)


class Plain(TinyRecursiveNetwork):
    """Adds a method that does not change the function."""

    def summary(self) -> str:
        return f"{self.config}"


def expected(net: TinyRecursiveNetwork, x: Tensor, y: Tensor, z: Tensor, mask: Tensor | None) -> Tensor:
    """Compute the recursion with explicit calls of the network, n = 2 and T = 2."""
    for _ in range(2):
        for _ in range(2):
            z = net(x + y + z, mask) if mask is not None else net(x + y + z)
        y = net(y + z, mask) if mask is not None else net(y + z)
    return y


@pytest.mark.interpreter
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [OwnForward, OwnCall, Mixed, Grandchild, OwnEager, FewerBlocks])
def test_no_backend_reads_past_a_class(
    kind: type[TinyRecursiveNetwork], backend: str, masked: bool, device: str
) -> None:
    if backend == "native" and device != "cpu":
        pytest.skip("the C++ kernels run on CPUs")
    net = kind(16, 2, 2, backend="eager").to(device).eval()
    states = [torch.randn(2, 6, 16, device=device) for _ in range(3)]
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6], device=device) if masked else None
    with torch.no_grad():
        right = expected(net, *states, mask)
        net.backend = backend
        refused = backend in ("triton", "native") and kind in (OwnEager, FewerBlocks)
        if refused:
            with pytest.raises(BackendError, match="overrides forward_eager or blocks"):
                net(states[0])
            with pytest.raises(BackendError, match="overrides forward_eager or blocks"):
                deep_recursion(net, *states, 2, 2, mask=mask)
            return
        found, _ = deep_recursion(net, *states, 2, 2, mask=mask)
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
    net.backend = "auto"
    new_y, _ = deep_recursion(net, *states, 2, 1, mask=mask)
    new_y.sum().backward()
    assert all(parameter.grad is not None for parameter in net.layers[0].parameters())


@pytest.mark.parametrize("kind", [OwnForward, OwnEager])
@pytest.mark.filterwarnings("ignore:running without a CUDA graph")
def test_graphed_recursions_call_it_too(kind: type[TinyRecursiveNetwork], device: str) -> None:
    net = kind(16, 1, 2, backend="auto").to(device).eval()
    states = [torch.randn(2, 6, 16, device=device) for _ in range(3)]
    with torch.no_grad():
        torch.testing.assert_close(graphed(net, n=2, T=2)(*states)[0], expected(net, *states, None))


@pytest.mark.interpreter
def test_a_class_that_computes_the_same_uses_fused_recursions(device: str) -> None:
    net = Plain(16, 1, 2, backend="triton").to(device)
    states = [torch.randn(1, 4, 16, device=device) for _ in range(3)]
    assert not net.overridden and not TransformerBlock.overridden
    from trm_kernels.backends import Recursion
    from trm_kernels.backends.checks import refuses_recursion

    assert refuses_recursion(net, states, Recursion(1)) is None
    reason = refuses_recursion(Grandchild(16, 1, 2).to(device), states, Recursion(1))
    assert reason == "Grandchild has its own forward, which would be skipped"
