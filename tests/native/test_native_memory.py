"""Memory of a recursion's graph, and the pool of free buffers."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.native.common import (
    INSTRUCTION_SETS,
    eager_of,
    hold_to_the_rule,
    instruction_set,
    lengths_mask,
    network,
    states,
)
from trm_kernels import latent_recursion, native_buffers


@pytest.fixture(autouse=True)
def _no_buffers() -> None:
    native_buffers.release()


def ready() -> int:
    return len(native_buffers._free)


def test_a_backward_returns_its_buffers_while_the_loss_is_alive() -> None:
    net = network()
    loss = latent_recursion(net, *states(2, 5), 2)[0].sum()
    before = ready()
    loss.backward(retain_graph=True)
    assert ready() == before + 1  # the backward's own workspace
    loss.backward()
    assert ready() == before + 3  # and the saved data, and the packed weights
    del loss
    assert ready() == before + 3


def test_a_deleted_graph_returns_its_buffers() -> None:
    out = latent_recursion(network(), *states(2, 5), 2)
    before = ready()
    del out
    assert ready() == before + 2


def test_a_checkpointed_recursion_saves_nothing() -> None:
    net = network()
    x, y, z = states(2, 5)
    y.requires_grad_()
    out = checkpoint(lambda y: latent_recursion(net, x, y, z, 2)[0], y, use_reentrant=False)
    # Workspace, saved data and packed weights: nothing is held for the backward.
    assert ready() == 3
    (gradient,) = torch.autograd.grad(out.sum(), y)
    (expected,) = torch.autograd.grad(latent_recursion(net, x, y, z, 2)[0].sum(), y)
    assert torch.equal(gradient, expected)


def test_two_recursions_at_once_share_no_buffer() -> None:
    net, given = network(), states(2, 5)
    first = latent_recursion(net, *given, 2)[0].sum()
    second = latent_recursion(net, *(state + 1.0 for state in given), 2)[0].sum()
    parameter = net.layers[0].self_attn.in_proj_weight
    (alone,) = torch.autograd.grad(first, parameter)
    torch.autograd.grad(second, parameter)
    (again,) = torch.autograd.grad(latent_recursion(net, *given, 2)[0].sum(), parameter)
    assert torch.equal(alone, again)


def test_buffers_over_the_limit_are_not_pooled(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = native_buffers.take(100), native_buffers.take(1000)
    monkeypatch.setattr(native_buffers, "MAX_BYTES", 2000)
    del small
    del large
    assert [tensor.numel() for tensor in native_buffers._free.values()] == [100]


def test_saved_tensor_hooks_see_saved_tensors() -> None:
    net, seen = network(), []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tensor.numel())
        return tensor.clone()

    x, y, z = states(2, 5)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = latent_recursion(net, x, y, z, 2)[0].sum()
    parameters = list(net.parameters())
    moved = torch.autograd.grad(out, parameters)
    straight = torch.autograd.grad(latent_recursion(net, x, y, z, 2)[0].sum(), parameters)
    assert len(seen) >= 2 + len(parameters)
    assert all(torch.equal(a, b) for a, b in zip(moved, straight, strict=True))


#: Aliases of the same memory that a hook may return instead of a saved tensor.
ALIASES: dict[str, Callable[[Tensor], Any]] = {
    "detach": lambda tensor: tensor.detach(),
    "a view": lambda tensor: tensor.view_as(tensor),
    "data": lambda tensor: tensor.data,
    "a storage": lambda tensor: (tensor.untyped_storage(), tensor.shape, tensor.dtype),
    "numpy": lambda tensor: tensor.detach().numpy(),
}


def _back(packed: Any) -> Tensor:
    if isinstance(packed, tuple):
        storage, shape, dtype = packed
        return torch.empty(0, dtype=dtype).set_(storage, 0, shape)
    return packed if isinstance(packed, Tensor) else torch.from_numpy(packed)


@pytest.mark.parametrize("alias", ALIASES)
def test_hooks_may_keep_aliases_of_saved_tensors(alias: str) -> None:
    net, (x, y, z) = network(), states(2, 5)
    parameters = list(net.parameters())
    expected = torch.autograd.grad(latent_recursion(net, x, y, z, 2)[0].sum(), parameters)
    native_buffers.release()
    with torch.autograd.graph.saved_tensors_hooks(ALIASES[alias], _back):
        out = latent_recursion(net, x, y, z, 2)[0].sum()
    latent_recursion(net, x + 1.0, y, z, 2)[0].sum().backward()  # takes every free buffer
    found = torch.autograd.grad(out, parameters)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    del out, found
    assert ready() > 0, "the memory returns to the pool"


def test_a_buffer_returns_with_the_last_alias_of_its_memory() -> None:
    buffer = native_buffers.take(100)
    names = [buffer.detach(), buffer[3:7], buffer.numpy()[1:], buffer.untyped_storage()]
    address = buffer.data_ptr()
    del buffer
    while names:
        assert ready() == 0
        names.pop()
    assert ready() == 1
    assert native_buffers.take(90).data_ptr() == address and address % 64 == 0


def test_garbage_collection_at_any_time_is_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    """The garbage collector returns buffers between any two steps, even during an iteration."""
    errors: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", errors.append)
    monkeypatch.setattr(native_buffers, "MAX_BYTES", 1 << 14)
    before = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for size in range(1, 400):
            cycle: list[Any] = [native_buffers.take(size)]
            cycle.append(cycle)
    finally:
        gc.set_threshold(*before)
    gc.collect()
    assert not errors
    assert sum(tensor.nbytes for tensor in native_buffers._free.values()) <= 1 << 14


def test_states_may_change_after_the_forward() -> None:
    """As with eager, for example a carry that is written in place before the backward."""
    net, given = network(), states(2, 5)
    gradients = []
    for each in (net, eager_of(net)):
        x, y, z = (state.clone() for state in given)
        out = latent_recursion(each, x, y, z, 2)[0].sum()
        y.zero_()
        z.zero_()
        gradients.append(torch.autograd.grad(out, list(each.parameters())))
    for ours, eager in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize(("family", "length", "width"), [("seed", 264, 16), ("scratch-tokens", 257, 256)])
def test_strides_around_a_kibibyte(family: str, length: int, width: int, name: str) -> None:
    """Rows of 256 floats have a larger stride, and buffers for 264 must be large enough."""
    mask = lengths_mask((264, 256), 264) if family == "seed" else None
    with instruction_set(name):
        hold_to_the_rule(family, 2, length, width=width, mask=mask, n=1, seeds=4)
