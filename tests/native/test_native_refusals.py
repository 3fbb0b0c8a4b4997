"""Calls that ``native`` does not support: by name they raise with a reason, with ``auto`` eager runs them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from tests.native.common import MIXERS, network, states
from trm_kernels import BackendError, TinyRecursiveNetwork, backends, deep_recursion, latent_recursion
from trm_kernels.native_module import MAX_BLOCKS

X = (2, 5, 16)


class LowRank(nn.Module):
    """An adapter as libraries insert it in place of a linear layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Subclass(Tensor):
    pass


def adapted(net: TinyRecursiveNetwork) -> None:
    mlp = net.layers[0].mlp
    mlp[0] = LowRank(mlp[0])


def hooked(net: TinyRecursiveNetwork) -> None:
    net.layers[0].register_forward_hook(lambda *_: None)


def hooked_inside(net: TinyRecursiveNetwork) -> None:
    net.layers[0].self_attn.register_forward_pre_hook(lambda *_: None)


def backward_hooked(net: TinyRecursiveNetwork) -> None:
    net.layers[0].norm1.register_full_backward_hook(lambda *_: None)


def other_forward(net: TinyRecursiveNetwork) -> None:
    net.layers[0].mlp.forward = lambda x: 2.0 * x


def other_gelu(net: TinyRecursiveNetwork) -> None:
    net.layers[0].mlp[1] = nn.GELU("tanh")


def without_a_bias(net: TinyRecursiveNetwork) -> None:
    net.layers[0].mlp[0].bias = None


def other_dtype(net: TinyRecursiveNetwork) -> None:
    net.layers[0].norm1.double()


MODULES: dict[str, tuple[Callable[[TinyRecursiveNetwork], None], str]] = {
    "adapter": (adapted, "submodule mlp.0 is a LowRank"),
    "hook on a block": (hooked, "a block has hooks"),
    "hook inside": (hooked_inside, "submodule self_attn has hooks"),
    "backward hook": (backward_hooked, "submodule norm1 has hooks"),
    "another forward": (other_forward, "submodule mlp has hooks or its own forward"),
    "tanh": (other_gelu, "GELU('tanh')"),
    "no bias": (without_a_bias, "mlp.0 has no parameter"),
    "one parameter in float64": (other_dtype, "a parameter of norm1 is torch.float64"),
}


def check(net: TinyRecursiveNetwork, x: Tensor, reason: str, mask: Tensor | None = None) -> None:
    """Check that networks and recursions raise by name, and that ``auto`` skips it for the same reason."""
    net.backend = "native"
    for call in (net, lambda x, mask: latent_recursion(net, x, x, x, 1, mask=mask)):
        with pytest.raises(BackendError, match=re.escape(reason)):
            call(x, mask)
    net.backend = "auto"
    selection = net.selected_backend(x, mask)
    assert selection.name == "eager" and reason in selection.passed_over["native"]


@pytest.mark.parametrize("case", MODULES)
def test_modules_that_compute_something_else(case: str) -> None:
    change, reason = MODULES[case]
    net = network()
    change(net)
    check(net, torch.randn(X), reason)
    if case != "one parameter in float64":
        assert torch.equal(net(x := torch.randn(X)), net.forward_eager(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    check(network().to(dtype), torch.randn(X, dtype=dtype), f"dtype {dtype} is neither")


def test_weights_and_input_of_different_dtypes() -> None:
    check(
        network(), torch.randn(X, dtype=torch.bfloat16), "is torch.float32, but the input is torch.bfloat16"
    )


def test_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        check(network(), torch.randn(X), "autocast")


def test_empty_batches() -> None:
    net, x = network(), torch.randn(0, 5, 16)
    check(net, x, "the batch is empty")
    assert net(x).shape == x.shape
    y, z = deep_recursion(net, x, x, x, 1, 2, mask=torch.ones(0, 5))
    assert y.shape == z.shape == x.shape


def test_empty_sequences_are_an_error() -> None:
    with pytest.raises(ValueError, match="the sequence is empty"):
        network()(torch.randn(2, 0, 16))


def test_too_many_blocks() -> None:
    net, x = network(layers=MAX_BLOCKS), torch.randn(X)
    torch.testing.assert_close(net(x), net.forward_eager(x), rtol=1e-3, atol=1e-3)
    check(network(layers=MAX_BLOCKS + 1), x, f"{MAX_BLOCKS + 1} blocks exceed the maximum of {MAX_BLOCKS}")


def test_other_devices() -> None:
    net = network()
    with pytest.raises(BackendError, match="the input is on meta"):
        net.to("meta")(torch.randn(X, device="meta"))
    net, x = network(), torch.randn(X)
    with pytest.raises(BackendError, match="the mask is on meta"):
        net(x, torch.ones(2, 5, device="meta"))
    net.layers[0].norm1.to("meta")
    with pytest.raises(BackendError, match="a parameter of norm1 is on meta"):
        net(x)


def test_tensors_that_may_hold_no_data() -> None:
    check(network(), torch.randn(X).as_subclass(Subclass), "the input is a Subclass")
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        net = network()
        x = torch.randn(X)
    with pytest.raises(BackendError):
        net(x)
    with mode:
        check(net, x, "dispatch mode")


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_function_transforms(transform: str) -> None:
    net, x = network(), torch.randn(3, *X)

    def call(x: Tensor) -> Tensor:
        return net(x).square().sum()

    def transformed() -> Any:
        if transform == "vmap":
            return torch.vmap(net)(x)
        return torch.func.grad(call)(x[0]) if transform == "grad" else torch.func.jvp(net, (x[0],), (x[1],))

    with pytest.raises(BackendError, match=r"torch\.func"):
        transformed()
    if transform != "jvp":  # which torch's attention does not support
        net.backend = "auto"
        found = transformed()
        net.backend = "eager"
        torch.testing.assert_close(found, transformed())


def test_forward_mode() -> None:
    net, x = network(), torch.randn(X)
    with forward_ad.dual_level():
        check(net, forward_ad.make_dual(x, torch.randn(X)), "forward-mode")


def test_inputs_made_in_inference_mode() -> None:
    net = network()
    with torch.inference_mode():
        x = torch.randn(X)
        assert net(x).shape == x.shape
    check(net, x, "created in inference mode")
    with torch.no_grad():
        net.backend = "native"
        assert net(x).shape == x.shape


def test_global_hooks() -> None:
    net, x = network(), torch.randn(X)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        check(net, x, "global module hooks")
    finally:
        handle.remove()
    assert net.selected_backend(x).name == "native"


def test_a_precision_for_gpus() -> None:
    net, (x, y, z) = network(), states(2, 5)
    for name in ("native", "auto"):
        net.backend = name
        with pytest.raises(BackendError, match=r"precision='fp8-nograd' requires a GPU"):
            latent_recursion(net, x, y, z, 1, precision="fp8-nograd")


@pytest.mark.parametrize("masked", [False, True])
def test_a_hook_on_the_network_sees_every_call(masked: bool) -> None:
    net, inputs = network(), states(2, 5)
    mask = torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]]) if masked else None
    whole = latent_recursion(net, *inputs, 2, mask=mask)
    calls: list[int] = []
    handle = net.register_forward_hook(lambda *_: calls.append(1))
    stepwise = latent_recursion(net, *inputs, 2, mask=mask)
    handle.remove()
    assert len(calls) == 3
    torch.testing.assert_close(whole, stepwise, rtol=1e-4, atol=1e-5)
    latent_recursion(net, *inputs, 2, mask=mask)
    assert len(calls) == 3


@pytest.mark.parametrize(
    "norm",
    [nn.LayerNorm(16), nn.RMSNorm((5, 16)), torch.tanh, nn.RMSNorm(16)],
    ids=["layer", "wrong shape", "function", "right"],
)
def test_an_output_norm_of_another_kind_is_called_step_by_step(norm: Any) -> None:
    family = "paper" if isinstance(norm, nn.RMSNorm) and norm.normalized_shape == (16,) else "seed"
    net, inputs = network(family), states(2, 5)
    found = latent_recursion(net, *inputs, 1, output_norm=norm)
    net.backend = "eager"
    expected = latent_recursion(net, *inputs, 1, output_norm=norm)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", MIXERS)
def test_auto_uses_native_for_supported_calls(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = network(family), torch.randn(X)
    net.backend = None
    assert net.selected_backend(x) == backends.Selection("native")
    ran = []
    backend = backends.BACKENDS["native"]
    monkeypatch.setitem(
        backends.BACKENDS,
        "native",
        backends.Backend(
            backend.name,
            backend.summary,
            backend.unavailable,
            backend.refuses,
            lambda *args: ran.append(1) or backend.run(*args),  # type: ignore[func-returns-value]
            backend.recursion,
        ),
    )
    net(x)
    assert ran
    with backends.use_backend("eager"):
        assert net.selected_backend(x).name == "eager"


def test_auto_under_torch_compile_uses_the_reference() -> None:
    net, x = network(), torch.randn(X)
    net.backend = "auto"
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), net.forward_eager(x))


@pytest.mark.parametrize("family", ["seed", "scratch"])
def test_attention_in_another_mode_uses_its_own_dropout(family: str) -> None:
    net, x = network(family, dropout=0.5).train(), torch.randn(X)
    net.layers.eval()
    assert "another mode" in (backends.refusal("native", net, x) or "")
    net.backend = None
    torch.testing.assert_close(net(x), net(x))
    net.layers.train()
    assert backends.refusal("native", net, x) is None
