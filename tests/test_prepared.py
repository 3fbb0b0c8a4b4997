"""Folded matrices kept for inference: whatever changes the weights drops them."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.ops.common import launched
from trm_kernels import TinyRecursiveNetwork, prepared
from trm_kernels.ops._launch import LAUNCHES

pytestmark = pytest.mark.interpreter


def build(device: str) -> TinyRecursiveNetwork:
    return TinyRecursiveNetwork(16, 1, 1, backend="triton").to(device).eval()


def folds_of(net: TinyRecursiveNetwork, x: Tensor) -> int:
    """Launches of the fold in one call without gradient."""
    before = LAUNCHES["fold_kernel"]
    with torch.no_grad():
        net(x)
    return LAUNCHES["fold_kernel"] - before


def by_optimizer(**options: bool) -> Callable[[TinyRecursiveNetwork], None]:
    def step(net: TinyRecursiveNetwork) -> None:
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, **options)
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    return step


def by_loading(assign: bool) -> Callable[[TinyRecursiveNetwork], None]:
    def load(net: TinyRecursiveNetwork) -> None:
        other = {name: value + 0.3 for name, value in net.state_dict().items()}
        net.load_state_dict(other, assign=assign)

    return load


def in_place(net: TinyRecursiveNetwork) -> None:
    with torch.no_grad():
        net.layers[0].norm1.weight.add_(0.5)


def through_data_while_training(net: TinyRecursiveNetwork) -> None:
    """As a captured training step does, or a hand-written optimizer: no version, no hook, no new pointer."""
    net.train()
    for parameter in net.parameters():
        parameter.data.add_(0.5)
    net.eval()


def there_and_back(net: TinyRecursiveNetwork) -> None:
    """Rounded to float16; each new tensor may lie where the one before it lay."""
    net.half().float()


def by_another_dtype(net: TinyRecursiveNetwork) -> None:
    net.norm_was = net.layers[0].norm1.weight.data_ptr()
    net.double().float()
    with torch.no_grad():
        net.layers[0].norm1.weight.mul_(1.5)


def by_replacement(net: TinyRecursiveNetwork) -> None:
    net.layers[0].norm1.weight = torch.nn.Parameter(torch.full_like(net.layers[0].norm1.weight, 2.0))


CHANGES = {
    "AdamW": by_optimizer(foreach=False),
    "foreach AdamW": by_optimizer(foreach=True),
    "fused AdamW": by_optimizer(fused=True),
    "load_state_dict": by_loading(False),
    "load_state_dict, assigned": by_loading(True),
    "in place": in_place,
    ".data in training": through_data_while_training,
    "half and back": there_and_back,
    "double and back": by_another_dtype,
    "another parameter": by_replacement,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_weights_is_seen(change: str, device: str) -> None:
    net = build(device)
    x = torch.randn(1, 3, 16, device=device)
    assert (folds_of(net, x), folds_of(net, x)) == (2, 0), "one matrix a sublayer, folded once"
    CHANGES[change](net)
    assert not net.training
    with torch.no_grad():
        torch.testing.assert_close(net(x), net.forward_eager(x), rtol=1e-4, atol=1e-5)
    assert folds_of(net, x) == 0


def test_memory_used_again_is_no_sign_of_the_same_weights(device: str) -> None:
    """Other values at the same addresses and versions, as allocators that reuse memory leave them."""
    net = build(device)
    x = torch.randn(1, 3, 16, device=device)
    folds_of(net, x)
    storage = {name: parameter.data for name, parameter in net.named_parameters()}

    def elsewhere_and_back(parameter: Tensor) -> Tensor:
        return next(data for data in storage.values() if data.data_ptr() == parameter.data_ptr()).mul_(1.25)

    with torch.no_grad():
        net._apply(elsewhere_and_back)  # what .to(), .half() and .cuda() call
        torch.testing.assert_close(net(x), net.forward_eager(x), rtol=1e-4, atol=1e-5)


def test_training_and_gradients_never_keep(device: str) -> None:
    net = build(device)
    x = torch.randn(1, 3, 16, device=device)
    net.train()
    assert (folds_of(net, x), folds_of(net, x)) == (2, 2)
    net.eval()
    with launched("fold_kernel"):
        net(x)
    with launched("fold_kernel"):
        net(x)


def test_operand_dtypes_are_told_apart(device: str) -> None:
    net = build(device)
    x = torch.randn(1, 3, 16, device=device)
    folds_of(net, x)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        under_autocast = net(x)
    with torch.no_grad():
        assert not torch.equal(under_autocast, net(x))
        torch.testing.assert_close(net(x), net.forward_eager(x), rtol=1e-4, atol=1e-5)


def test_networks_do_not_share_and_do_not_linger(device: str) -> None:
    nets = [build(device), build(device)]
    x = torch.randn(1, 3, 16, device=device)
    assert [folds_of(net, x) for net in (*nets, *nets)] == [2, 2, 0, 0]
    copied = copy.deepcopy(nets[0])
    assert folds_of(copied, x) == 2
    gc.collect()
    kept = len(prepared._kept)
    del copied
    gc.collect()
    assert len(prepared._kept) == kept - 1


def test_what_was_kept_in_inference_mode_serves_training(device: str) -> None:
    net = build(device)
    x = torch.randn(1, 3, 16, device=device)
    with torch.inference_mode():
        net(x)
    leaf = x.clone().requires_grad_()
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    net(leaf).sum().backward()
    assert leaf.grad is not None


def test_a_network_made_in_inference_mode_runs(device: str) -> None:
    with torch.inference_mode():
        net = build(device)
        x = torch.randn(1, 3, 16, device=device)
        torch.testing.assert_close(net(x), net.forward_eager(x), rtol=1e-4, atol=1e-5)
        net.layers[0].norm1.weight.add_(0.5)
        torch.testing.assert_close(net(x), net.forward_eager(x), rtol=1e-4, atol=1e-5)


def test_compiled_calls_keep_nothing(device: str) -> None:
    net = build(device)
    x = torch.randn(1, 3, 16, device=device)
    prepared.forget()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(x)
        assert not prepared._kept
        in_place(net)
        torch.testing.assert_close(compiled(x), net.forward_eager(x), rtol=1e-4, atol=1e-5)


def test_a_captured_call_keeps_nothing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay must fold the weights of its own time."""
    net = build(device)
    x = torch.randn(1, 3, 16, device=device)
    prepared.forget()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    if device == "cuda":
        pytest.skip("capturing for real: test_graphs.py")
    assert (folds_of(net, x), folds_of(net, x)) == (2, 2)
    assert not prepared._kept
