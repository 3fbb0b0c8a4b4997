"""The cache of packed weights of the ``native`` backend, valid while the weights stay the same."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.native.common import MIXERS, network
from trm_kernels import (
    BackendError,
    TinyRecursiveNetwork,
    latent_recursion,
    native_module,
    native_weights,
    prepared,
)
from trm_kernels.backends import native


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by one with each packing of a network's weights."""
    counts: list[int] = []
    pack = native._Call.block_tensors

    def counting(call: Any, parameters: Any) -> Any:
        counts.append(1)
        return pack(call, parameters)

    monkeypatch.setattr(native._Call, "block_tensors", counting)
    return counts


def by_optimizer(kind: type[torch.optim.Optimizer], **options: Any) -> Callable[[TinyRecursiveNetwork], None]:
    def step(net: TinyRecursiveNetwork) -> None:
        optimizer = kind(net.parameters(), lr=0.1, **options)  # type: ignore[call-arg]
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    return step


def by_loading(assign: bool) -> Callable[[TinyRecursiveNetwork], None]:
    def load(net: TinyRecursiveNetwork) -> None:
        other = {name: value + 0.3 for name, value in net.state_dict().items()}
        net.load_state_dict(other, assign=assign)

    return load


def loading_a_block(net: TinyRecursiveNetwork) -> None:
    net.layers[0].load_state_dict({name: value + 0.3 for name, value in net.layers[0].state_dict().items()})


def in_place(net: TinyRecursiveNetwork) -> None:
    with torch.no_grad():
        next(net.parameters()).mul_(1.5)


def through_data_while_training(net: TinyRecursiveNetwork) -> None:
    """As in a hand-written optimizer: no version, no hook, no new pointer."""
    net.train()
    for parameter in net.parameters():
        parameter.data.add_(0.5)
    net.eval()


def through_bfloat16(net: TinyRecursiveNetwork) -> None:
    """Round-trip through bfloat16; each new tensor may have the address of the previous one."""
    net.to(torch.bfloat16).to(torch.float32)


def by_replacement(net: TinyRecursiveNetwork) -> None:
    linear = next(module for module in net.modules() if isinstance(module, nn.Linear))
    linear.weight = nn.Parameter(linear.weight.detach() * 2.0)


CHANGES: dict[str, Callable[[TinyRecursiveNetwork], None]] = {
    "SGD": by_optimizer(torch.optim.SGD),
    "AdamW": by_optimizer(torch.optim.AdamW, foreach=False),
    "foreach AdamW": by_optimizer(torch.optim.AdamW, foreach=True),
    "fused AdamW": by_optimizer(torch.optim.AdamW, fused=True),
    "load_state_dict": by_loading(False),
    "load_state_dict, assigned": by_loading(True),
    "load_state_dict of a block": loading_a_block,
    "in place": in_place,
    ".data in training": through_data_while_training,
    "bfloat16 and back": through_bfloat16,
    "another parameter": by_replacement,
}


@pytest.mark.parametrize("family", MIXERS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_weights_is_seen(change: str, family: str, packs: list[int]) -> None:
    net, x = network(family).eval(), torch.randn(2, 5, 16)
    with torch.no_grad():
        before = net(x)
        assert torch.equal(net(x), before) and len(packs) == 1, "packed once"
    CHANGES[change](net)
    assert not net.training
    with torch.no_grad():
        after = net(x)
        assert not torch.equal(after, before)
        torch.testing.assert_close(after, net.forward_eager(x), rtol=1e-4, atol=1e-5)
        y, _ = latent_recursion(net, x, x, x, 1)
        net.backend = "eager"
        torch.testing.assert_close(y, latent_recursion(net, x, x, x, 1)[0], rtol=1e-4, atol=1e-4)
    assert len(packs) == 2, "packed once more, for networks and recursions"


def test_an_optimizer_of_something_else_costs_no_packing(packs: list[int]) -> None:
    net, x = network().eval(), torch.randn(2, 5, 16)
    other = nn.Linear(2, 2)
    with torch.no_grad():
        before = net(x)
    by_optimizer(torch.optim.SGD)(other)  # type: ignore[arg-type]
    with torch.no_grad():
        assert torch.equal(net(x), before)
    assert len(packs) == 1


def test_the_same_weights_elsewhere_cost_no_packing(packs: list[int]) -> None:
    net, x = network().eval(), torch.randn(2, 5, 16)
    with torch.no_grad():
        before = net(x)
        net.load_state_dict(copy.deepcopy(net.state_dict()), assign=True)
        assert torch.equal(net(x), before)
    assert len(packs) == 1


def test_noncontiguous_weights_are_packed_every_time(packs: list[int]) -> None:
    net, x = network().eval(), torch.randn(2, 5, 16)
    weight = net.layers[0].self_attn.out_proj.weight
    weight.data = weight.data.T
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(net(x), net.forward_eager(x), rtol=1e-4, atol=1e-5)
            weight.data.add_(0.1)
    assert len(packs) == 2


def test_new_weights_reuse_the_memory_of_the_old(packs: list[int]) -> None:
    """New pages would cost more than the packing itself."""
    net, x = network().eval(), torch.randn(2, 5, 16)
    addresses = set()
    with torch.no_grad():
        for _ in range(5):
            net(x)
            ((_, packed),) = native_weights._cache[net].values()
            addresses.add(packed.data_ptr())
            del packed
            in_place(net)
    assert len(packs) == 5 and len(addresses) == 1


def test_recorded_calls_are_never_cached(packs: list[int]) -> None:
    net, x = network(), torch.randn(2, 5, 16)
    prepared.forget()
    for mode in (True, False):
        net.train(mode)
        net(x)
        net(x)
    assert len(packs) == 4 and not native_weights._cache
    with torch.no_grad():
        net.train()(x)
    net.eval().requires_grad_(False)(x)
    assert len(packs) == 5 and len(native_weights._cache) == 1


def test_packing_during_a_write_is_not_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest and the packing see different weights, because the writer reverts its change afterwards."""
    net, x = network().eval(), torch.randn(2, 5, 16)
    weight = net.layers[0].self_attn.out_proj.weight
    pack = native._Call._pack

    def pack_meanwhile(call: native._Call) -> torch.Tensor:
        weight.data.mul_(-1.0)
        try:
            return pack(call)
        finally:
            weight.data.add_(1.0)

    with torch.no_grad():
        saved = weight.clone()
        monkeypatch.setattr(native._Call, "_pack", pack_meanwhile)
        net(x)
        monkeypatch.undo()
        weight.data.copy_(saved)
        torch.testing.assert_close(net(x), net.forward_eager(x), rtol=1e-4, atol=1e-5)


def test_replacing_memory_in_another_thread_frees_nothing_in_use() -> None:
    """As when a LoRA is merged during other calls; if not kept alive, the old memory is freed (SIGSEGV)."""
    net, x = TinyRecursiveNetwork(512, 1, 8, backend="native").eval(), torch.randn(1, 4, 512)
    weight, stop = net.layers[0].mlp[0].weight, threading.Event()

    def merge() -> None:
        while not stop.is_set():
            weight.data = weight.data * 1.0

    thread = threading.Thread(target=merge)
    thread.start()
    try:
        with torch.no_grad():
            expected = net.forward_eager(x)
            for _ in range(200):
                torch.testing.assert_close(net(x), expected, rtol=1e-3, atol=1e-4)
    finally:
        stop.set()
        thread.join()


def test_dtype_and_sign_of_weights_matter_as_well_as_bits() -> None:
    """The same bytes with another dtype, or with the negative bit set, are different weights."""
    kernels = native_module.network(network().config)
    weight = torch.randn(16, 16)
    seen = {
        native_weights._digest([part], kernels)
        for part in (weight, weight.view(torch.int32), weight.view(8, 32))
    }
    assert len(seen) == 3
    negative = torch.view_as_complex(torch.randn(4, 4, 2)).conj().imag
    assert negative.is_neg() and native_weights._digest([negative], kernels) is None


def test_weights_without_memory_are_refused() -> None:
    net, x = network().eval(), torch.randn(2, 5, 16)
    net.layers[0].self_attn.out_proj.weight.untyped_storage().resize_(0)
    with torch.no_grad(), pytest.raises(BackendError, match="no memory of its own"):
        net(x)


def test_a_training_loop_sees_every_step() -> None:
    """Native and eager train from the same weights, with evaluations between the steps."""
    net = network("scratch")
    eager = copy.deepcopy(net)
    eager.backend = "eager"
    x, target = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    losses: list[list[float]] = []
    for module in (net, eager):
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, fused=True)
        found = []
        for _ in range(5):
            y, _ = latent_recursion(module.train(), x, x, x, 1)
            loss = (y - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            module.eval()
            with torch.no_grad():
                found += [loss.item(), (module(x) - target).square().mean().item()]
        losses.append(found)
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-3, atol=1e-4)
    assert len(set(losses[0])) == 10


def test_copies_are_independent_and_are_freed(packs: list[int]) -> None:
    net, x = network().eval(), torch.randn(2, 5, 16)
    with torch.no_grad():
        before = net(x)
        copied = copy.deepcopy(net)
        assert torch.equal(copied(x), before) and len(packs) == 2
        in_place(copied)
        assert torch.equal(net(x), before)
        torch.testing.assert_close(copied(x), copied.forward_eager(x), rtol=1e-4, atol=1e-5)
        assert not torch.equal(copied(x), before)
    gc.collect()
    kept = len(native_weights._cache)
    del copied
    gc.collect()
    assert len(native_weights._cache) == kept - 1


def test_the_papers_two_precisions_alternate(packs: list[int]) -> None:
    """Float32 weights with float32 and bfloat16 inputs, packed once for each."""
    net, x = network("paper").eval(), torch.randn(2, 5, 16)
    with torch.no_grad():
        wide, narrow = net(x), net(x.bfloat16())
        assert torch.equal(net(x), wide) and torch.equal(net(x.bfloat16()), narrow)
    assert len(packs) == 2 and narrow.dtype == torch.bfloat16


def test_weights_packed_in_inference_mode_work_in_training() -> None:
    net, x = network().eval(), torch.randn(2, 5, 16)
    with torch.inference_mode():
        net(x)
    leaf = x.clone().requires_grad_()
    net.requires_grad_(False)
    with torch.no_grad():
        net(x)
    net(leaf).sum().backward()
    assert leaf.grad is not None and leaf.grad.any()


def test_a_network_made_in_inference_mode_runs() -> None:
    with torch.inference_mode():
        net, x = network().eval(), torch.randn(2, 5, 16)
        torch.testing.assert_close(net(x), net.forward_eager(x), rtol=1e-4, atol=1e-5)
        in_place(net)
        torch.testing.assert_close(net(x), net.forward_eager(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("memory", ["fast", "small"])
@pytest.mark.parametrize("family", MIXERS)
def test_a_parameter_changed_before_the_backward_raises(family: str, memory: str) -> None:
    net, x = network(family), torch.randn(2, 5, 16)
    for parameter in net.parameters():
        y, _ = latent_recursion(net, x, x, x, 1, memory=memory)  # type: ignore[arg-type]
        with torch.no_grad():
            parameter.mul_(1.5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_a_norm_changed_before_the_backward_raises() -> None:
    net, norm = network(), nn.RMSNorm(16, eps=1e-6)
    given = [torch.randn(2, 5, 16) for _ in range(3)]
    y = latent_recursion(net, *given, 1, output_norm=norm)[0]
    with torch.no_grad():
        norm.weight.mul_(1.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
