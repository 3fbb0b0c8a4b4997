"""Frozen networks: matrices are prepared once, and changes to weights raise."""

from __future__ import annotations

import copy
import gc
import itertools
import multiprocessing
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.graph_double import LaunchingCapturer, RecordedGraph
from trm_kernels import (
    FrozenError,
    GraphCache,
    TinyRecursiveNetwork,
    deep_recursion,
    frozen,
    graphed,
    prepared,
    reference,
)
from trm_kernels.backends import native
from trm_kernels.ops._launch import LAUNCHES


def build(device: str = "cpu", backend: str | None = None) -> TinyRecursiveNetwork:
    return TinyRecursiveNetwork(16, 1, 1, backend=backend).to(device).eval()


BACKENDS = pytest.mark.parametrize(
    "backend", ["native", pytest.param("triton", marks=pytest.mark.interpreter)]
)


def built(backend: str, device: str) -> tuple[TinyRecursiveNetwork, Tensor]:
    """Return a network with this backend, and an input, on a device where the backend runs."""
    place = device if backend == "triton" else "cpu"
    return build(place, backend), torch.randn(1, 3, 16, device=place)


def folds_of(net: TinyRecursiveNetwork, x: Tensor) -> int:
    """Return the number of fold launches in one call without gradients."""
    before = LAUNCHES["fold_kernel"]
    with torch.no_grad():
        net(x)
    return LAUNCHES["fold_kernel"] - before


def close(net: TinyRecursiveNetwork, x: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(net(x), net.forward_eager(x), rtol=1e-4, atol=1e-5)


def step(net: TinyRecursiveNetwork) -> None:
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(net.parameters(), lr=0.1).step()


#: Actions that raise immediately.
STOPPED: dict[str, Callable[[TinyRecursiveNetwork], object]] = {
    "an optimizer's step": step,
    "load_state_dict": lambda net: net.load_state_dict(net.state_dict()),
    "load_state_dict, assigned": lambda net: net.load_state_dict(net.state_dict(), assign=True),
    "train": lambda net: net.train(),
    "to": lambda net: net.to(torch.float64),
    "half": lambda net: net.half(),
    "share_memory": lambda net: net.share_memory(),
    "a module around it, to": lambda net: nn.Sequential(net).double(),
    "a module around it, train": lambda net: nn.Sequential(net).train(),
}


@pytest.mark.parametrize("what", STOPPED)
def test_actions_that_may_change_weights_raise(what: str) -> None:
    net = build()
    before = copy.deepcopy(net.state_dict())
    with frozen(net):
        with pytest.raises(FrozenError, match=r"frozen network: do it outside trm_kernels\.frozen"):
            STOPPED[what](net)
        assert not net.training
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    STOPPED[what](net)


def in_place(net: TinyRecursiveNetwork) -> None:
    with torch.no_grad():
        net.layers[0].norm1.weight.add_(0.5)


def other_storage(net: TinyRecursiveNetwork) -> None:
    """If the old storage were not kept alive, the new one might get its address."""
    weight = net.layers[0].norm1.weight
    weight.data = torch.full_like(weight, 2.0)


def transposed(net: TinyRecursiveNetwork) -> None:
    """The same memory with different strides."""
    weight = net.layers[0].self_attn.out_proj.weight
    weight.data = weight.data.T


def where_the_old_one_lay(net: TinyRecursiveNetwork) -> None:
    """If the old storage were not kept alive, a new one of the same size would often get its address."""
    weight = net.layers[0].self_attn.out_proj.weight
    weight.data = torch.empty(0)
    weight.data = torch.full((16, 16), 2.0)


def other_parameter(net: TinyRecursiveNetwork) -> None:
    weight = net.layers[0].norm1.weight
    del net.layers[0].norm1.weight
    net.layers[0].norm1.weight = nn.Parameter(torch.full_like(weight, 2.0))


def change_places(net: TinyRecursiveNetwork) -> None:
    block = net.layers[0]
    block.norm1.weight, block.norm2.weight = block.norm2.weight, block.norm1.weight


def load_a_block(net: TinyRecursiveNetwork) -> None:
    net.layers[0].load_state_dict({name: value + 0.3 for name, value in net.layers[0].state_dict().items()})


#: Changes that the next call detects.
SEEN = (
    in_place,
    other_storage,
    where_the_old_one_lay,
    transposed,
    other_parameter,
    change_places,
    load_a_block,
)


@BACKENDS
@pytest.mark.parametrize("change", SEEN)
def test_the_next_call_reports_changed_weights(
    change: Callable[..., None], backend: str, device: str
) -> None:
    net, x = built(backend, device)
    with torch.no_grad(), frozen(net):
        net(x)
        change(net)
        with pytest.raises(FrozenError, match="frozen network"):
            net(x)
        with pytest.raises(FrozenError, match="frozen network"):
            deep_recursion(net, x, x, x, 1, 1)
    close(net, x)


@BACKENDS
def test_functional_call_with_other_weights_is_refused(backend: str, device: str) -> None:
    net, x = built(backend, device)
    replaced = {"layers.0.mlp.0.weight": torch.randn(64, 16, device=x.device)}
    with torch.no_grad(), frozen(net), pytest.raises(FrozenError, match="been replaced"):
        torch.func.functional_call(net, replaced, (x,))


@pytest.mark.interpreter
def test_triton_folds_once_while_frozen_else_in_every_call(device: str) -> None:
    net, x = build(device, "triton"), torch.randn(1, 3, 16, device=device)
    assert (folds_of(net, x), folds_of(net, x)) == (2, 2), "one matrix per sublayer"
    for _ in range(2):
        with frozen(net):
            assert (folds_of(net, x), folds_of(net, x)) == (2, 0)
            close(net, x)
        in_place(net)
        assert folds_of(net, x) == 2
        close(net, x)


def test_native_packs_and_reads_once_while_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = build(backend="native"), torch.randn(1, 3, 16)
    packs: list[object] = []
    pack = native._Call._pack
    monkeypatch.setattr(native._Call, "_pack", lambda call: packs.append(call) or pack(call))
    monkeypatch.delattr("trm_kernels.native_weights._digest")
    with torch.no_grad(), frozen(net):
        expected = net.forward_eager(x)
        for _ in range(3):
            torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)
    assert len(packs) == 1


@BACKENDS
def test_gradients_are_recorded_while_frozen(backend: str, device: str) -> None:
    net, x = built(backend, device)
    expected = torch.autograd.grad(net.forward_eager(x).sum(), list(net.parameters()))
    with frozen(net):
        with torch.inference_mode():
            net(x)
        found = torch.autograd.grad(net(x).sum(), list(net.parameters()))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.interpreter
def test_operand_dtypes_are_distinguished(device: str) -> None:
    net, x = build(device, "triton"), torch.randn(1, 3, 16, device=device)
    with torch.no_grad(), frozen(net):
        net(x)
        with torch.autocast(device, torch.bfloat16):
            narrow = net(x)
        assert not torch.equal(narrow, net(x))
        close(net, x)


@pytest.mark.interpreter
def test_matrices_prepared_in_inference_mode_work_in_training(device: str) -> None:
    net, x = build(device, "triton").requires_grad_(False), torch.randn(1, 3, 16, device=device)
    with frozen(net):
        with torch.inference_mode():
            net(x)
        leaf = x.clone().requires_grad_()
        net(leaf).sum().backward()
        again = x.clone().requires_grad_()
        deep_recursion(net, again, again, again, 1, 2)[0].sum().backward()
    assert leaf.grad is not None and again.grad is not None


@pytest.mark.interpreter
@pytest.mark.parametrize("family", ["scratch", "paper"])
def test_fp8_alternates_with_other_precisions(family: str, device: str) -> None:
    net = TinyRecursiveNetwork(16, 1, 1, family=family, backend="triton").to(device).eval()
    given = torch.randn(3, 1, 3, 16, device=device).unbind()

    def run(dtype: torch.dtype, precision: str | None) -> Tensor:
        with torch.no_grad(), torch.autocast(device, dtype, enabled=dtype != torch.float32):
            return deep_recursion(net, *given, 1, 1, precision=precision)[0]  # type: ignore[arg-type]

    kinds = [(torch.float32, None), (torch.float32, "fp8-nograd"), (torch.bfloat16, "fp8-nograd")]
    expected = [run(*kind) for kind in kinds]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(expected, 2))
    with frozen(net):
        for _ in range(2):
            for kind, alone in zip(kinds, expected, strict=True):
                assert torch.equal(run(*kind), alone)


@pytest.mark.interpreter
def test_a_capture_reads_matrices_prepared_before_it(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices prepared inside a capture would be in its memory, and every replay would fold them again."""
    if device == "cuda":
        pytest.skip("capturing for real: test_graphs.py")
    net, x = build(device, "triton"), torch.randn(1, 3, 16)
    with frozen(net), prepared.read_in_captures([prepared.freeze_id(net)]) as read:
        monkeypatch.setattr(prepared, "_is_capturing", lambda weight: True)
        assert (folds_of(net, x), folds_of(net, x)) == (2, 2) and not read
        monkeypatch.setattr(prepared, "_is_capturing", lambda weight: False)
        assert folds_of(net, x) == 2 and not read
        monkeypatch.setattr(prepared, "_is_capturing", lambda weight: True)
        assert folds_of(net, x) == 0 and len(read) > 0, "the graph keeps them alive"


@pytest.mark.interpreter
def test_a_foreign_capture_folds_the_current_weights(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be replayed after the freeze, or in another one: a user's own capture, a race for a freeze."""
    if device == "cuda":
        pytest.skip("capturing for real: test_graphs.py")
    net, x = build(device, "triton"), torch.randn(1, 3, 16)
    with frozen(net):
        assert (folds_of(net, x), folds_of(net, x)) == (2, 0)
        monkeypatch.setattr(prepared, "_is_capturing", lambda weight: True)
        with prepared.read_in_captures([prepared.freeze_id(net) - 1, prepared.freeze_id(net) + 1]) as read:
            assert folds_of(net, x) == 2 and not read
        assert folds_of(net, x) == 2


def test_graphed_functions_pass_freeze_ids_of_their_keys_to_captures() -> None:
    seen: list[frozenset[int]] = []
    net = build(backend="eager")

    class Capturer(LaunchingCapturer):
        def capture(self, *args: Any) -> RecordedGraph:
            seen.append(prepared._local.reading.freeze_ids)
            return super().capture(*args)

    fast, states = graphed(net, 1, 1, cache=GraphCache(capturer=Capturer())), torch.randn(3, 1, 3, 16)
    fast(*states)
    with frozen(net):
        fast(*states)
        number = prepared.freeze_id(net)
    assert seen == [{0}, {number}] and number > 0


@pytest.mark.interpreter
def test_compiled_calls_read_the_current_weights(device: str) -> None:
    net, x = build(device, "triton"), torch.randn(1, 3, 16, device=device)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(x)
        in_place(net)
        torch.testing.assert_close(compiled(x), net.forward_eager(x), rtol=1e-4, atol=1e-5)


def test_a_graph_captured_while_frozen_is_not_replayed_afterwards() -> None:
    net, cache = build(backend="eager"), GraphCache(capturer=LaunchingCapturer())
    fast, states = graphed(net, 1, 1, cache=cache), torch.randn(3, 1, 3, 16).unbind()

    def right() -> None:
        expected = deep_recursion(net, *states, 1, 1, with_gradients=False)[0]
        torch.testing.assert_close(fast(*states)[0], expected)

    right()
    for captures in (2, 3):
        with frozen(net):
            right()
            right()
            assert cache.status().captures == captures
            in_place(net)
            with pytest.raises(FrozenError, match="been modified"):
                fast(*states)
        right()
        assert cache.status().captures == captures, "the first graph is used again"


def test_graphed_opens_and_closes_its_freeze() -> None:
    net, cache = build(backend="eager"), GraphCache(capturer=LaunchingCapturer())
    states = torch.randn(3, 1, 3, 16).unbind()
    fast = graphed(net, 1, 1, frozen=True, cache=cache)
    fast(*states)
    with pytest.raises(FrozenError, match="without frozen=True"):
        net.train()
    fast.thaw()
    in_place(net)
    expected = deep_recursion(net, *states, 1, 1, with_gradients=False)[0]
    torch.testing.assert_close(fast(*states)[0], expected)
    fast = graphed(net, 1, 1, frozen=True, cache=cache)
    fast(*states)
    gc.disable()
    try:
        del fast
        net.train()
    finally:
        gc.enable()


def test_a_network_that_holds_its_own_graphs_is_freed() -> None:
    net = build(backend="eager")
    net.fast = graphed(net, 1, 1, frozen=True, cache=GraphCache(capturer=LaunchingCapturer()))
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None and not prepared._freezes


def test_matrices_are_freed_with_the_freeze() -> None:
    net, x = build(backend="native"), torch.randn(1, 3, 16)
    with torch.no_grad(), frozen(net):
        net(x)
        ((_, shared),) = prepared._freeze_of(net)._cache[net].values()  # type: ignore[union-attr]
        made = weakref.ref(shared)
        del shared
    assert made() is None


def test_a_freeze_cannot_be_opened_twice() -> None:
    freeze = prepared.Frozen(build())
    with freeze, pytest.raises(RuntimeError, match="already open"):
        freeze.open()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_forked_during_preparation_does_not_deadlock() -> None:
    net, started, resume = build(backend="native"), threading.Event(), threading.Event()

    def make() -> list[Tensor]:
        started.set()
        resume.wait(30)
        return [torch.ones(1)]

    with frozen(net):
        thread = threading.Thread(target=lambda: prepared.matrices(net, list(net.parameters()), "form", make))
        thread.start()
        started.wait(30)
        child = multiprocessing.get_context("fork").Process(target=_freeze)
        child.start()
        child.join(30)
        resume.set()
        thread.join()
    assert child.exitcode == 0


def _freeze() -> None:
    with frozen(build()):
        pass


def test_freezes_nest_and_end_with_their_block() -> None:
    inner, outer = build(), nn.ModuleList([build(), build()])
    outer.append(inner)
    with frozen(outer):
        with frozen(inner), pytest.raises(FrozenError):
            inner.train()
        with pytest.raises(FrozenError):
            inner.train()
        copy.deepcopy(inner).train()
        step(build())
    with pytest.raises(ZeroDivisionError), frozen(inner):
        _ = 1 / 0
    step(inner)
    outer.train()
    assert not prepared._freezes


def test_modules_that_cannot_be_frozen_raise() -> None:
    with pytest.raises(ValueError, match="training mode cannot be frozen"), frozen(build().train()):
        pass
    with (
        pytest.raises(ValueError, match="this Linear contains no network of trm_kernels"),
        frozen(nn.Linear(2, 2)),
    ):
        pass
    with pytest.raises(ValueError, match="nothing to freeze"):
        graphed(reference.TinyRecursiveNetwork(build().config), 1, 1, frozen=True)


@pytest.mark.gpu
def test_gpu_a_frozen_graph_computes_the_same() -> None:
    net = TinyRecursiveNetwork(64, 2, 2, backend="triton").cuda().eval()
    states = torch.randn(3, 2, 16, 64, device="cuda").unbind()
    plain = graphed(net, 2, 2, cache=GraphCache())(*states)
    with torch.cuda.stream(torch.cuda.Stream()):
        fast = graphed(net, 2, 2, frozen=True, cache=GraphCache())
        for _ in range(3):
            for ours, theirs in zip(fast(*states), plain, strict=True):
                assert torch.equal(ours, theirs)
