"""Every autograd.Function of trm_kernels under torch.compile, with outputs and gradients compared to eager.

torch.compile traces an autograd.Function with its own rules, which change between torch versions and may lose
gradients silently: 2.11 returns zeros if a forward returns a tensor that it modified in place.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import trm_kernels
from tests.ops.recursions import Problem, holes, make_network, results_and_gradients
from trm_kernels import (
    Packing,
    TinyRecursiveNetwork,
    deep_recursion,
    latent_recursion,
    native_module,
    reference,
    use_backend,
)
from trm_kernels.backends.fused import block_parameters
from trm_kernels.backends.native import _Recursion as NativeRecursion
from trm_kernels.backends.packed import SortedRows, _Normalise
from trm_kernels.backends.packed_attention import _ShortAttention, _ShortSequences
from trm_kernels.ops.attention_op import _Attention, attention
from trm_kernels.ops.mlp import _Mlp, mlp
from trm_kernels.ops.norm import _Add3RmsNorm, add3_rms_norm
from trm_kernels.ops.recursion import _Recursion
from trm_kernels.packing import Rows, _Gather
from trm_kernels.testing import relative_error

pytestmark = pytest.mark.interpreter

Leaves = dict[str, Tensor]
#: A function of leaves, and the leaves.
Case = tuple[Callable[[Leaves], tuple[Tensor, ...]], Leaves]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def randn(device: str, **shapes: tuple[int, ...]) -> Leaves:
    return {name: torch.randn(shape, device=device) for name, shape in shapes.items()}


def gather(rows_of: Callable[[Tensor], Rows], device: str) -> Case:
    """Pack and unpack, with an operation between them that differs per row."""
    mask = holes(device)

    def call(leaves: Leaves) -> tuple[Tensor, ...]:
        rows = rows_of(mask)
        packed = rows.pack(leaves["x"])
        return packed, rows.unpack(packed.sin() * leaves["scale"])

    return call, randn(device, x=(*mask.shape, 4), scale=(4,))


def packing_made_inside(device: str) -> Case:
    return gather(Packing.of, device)


def packing_made_outside(device: str) -> Case:
    packing = Packing.of(holes(device), rows=6)
    return gather(lambda _: packing, device)


def sorted_rows(device: str) -> Case:
    mask = holes(device)
    rows = SortedRows.of(mask, mask.sum(dim=1).tolist())
    return gather(lambda _: rows, device)


def normalise(device: str) -> Case:
    return lambda leaves: (_Normalise.apply(leaves["x"], 1e-5),), randn(device, x=(5, 8))


def short_attention(device: str) -> Case:
    plan = _ShortSequences(((2, 3), (1, 5)), 2)
    return lambda leaves: (_ShortAttention.apply(leaves["qkv"], plan),), randn(device, qkv=(11, 24))


def add3(device: str) -> Case:
    leaves = randn(device, x=(2, 3, 8), y=(2, 3, 8), z=(2, 3, 8), weight=(8,))
    return lambda leaves: add3_rms_norm(*leaves.values(), 1e-6), leaves


def mlp_sublayer(device: str) -> Case:
    (block,) = make_network("seed", torch.float32, device, layers=1).layers
    parameters = {str(i): p.detach() for i, p in enumerate(block_parameters(block)[-5:])}
    mask = holes(device).to(torch.uint8)

    def call(leaves: Leaves) -> tuple[Tensor, ...]:
        x, *parameters = leaves.values()
        return (mlp(x, parameters, mask, "seed", 1e-6, torch.float32),)

    return call, randn(device, x=(*mask.shape, 8)) | parameters


def rotated_attention(device: str) -> Case:
    mask = holes(device).to(torch.uint8)
    qkv = randn(device, qkv=(*mask.shape, 24))
    cos, sin = reference.rotary_tables(mask.shape[1], 4, 1e4, qkv["qkv"])
    seed = torch.tensor([5], device=device)
    return lambda leaves: (attention(leaves["qkv"], 2, mask, cos, sin, 0.2, seed),), qkv


def recursion(layout: str, n: int, device: str, **options: Any) -> Case:
    net = make_network(layout, torch.float32, device, layers=1)
    case = Problem(net, layout, n, **options)
    return case.ours, case.leaves(torch.float32, device)


def packed_recursion(device: str) -> Case:
    return recursion("seed", 1, device, mask=holes(device), packed=True, output_norm=True)


def small_recursion(device: str) -> Case:
    return recursion("paper-tokens", 1, device, memory="small")


def one_call(device: str) -> Case:
    return recursion("scratch", 0, device, mask=holes(device))


#: Cases of each function. Those of ``trm_kernels.ops`` implement the gradients of the ops with the same
#: names.
CASES: dict[type[torch.autograd.Function], tuple[Callable[[str], Case], ...]] = {
    _Gather: (packing_made_inside, packing_made_outside, sorted_rows),
    _Normalise: (normalise,),
    _ShortAttention: (short_attention,),
    _Add3RmsNorm: (add3,),
    _Mlp: (mlp_sublayer,),
    _Attention: (rotated_attention,),
    _Recursion: (packed_recursion, small_recursion, one_call),
}
#: Never traced: the backend refuses, or ``auto`` selects another one.
REFUSED = {NativeRecursion}


def defined() -> set[type[torch.autograd.Function]]:
    """Return every autograd.Function of the package."""
    for module in pkgutil.walk_packages(trm_kernels.__path__, "trm_kernels."):
        importlib.import_module(module.name)
    found, unseen = set(), [torch.autograd.Function]
    while unseen:
        for function in unseen.pop().__subclasses__():
            unseen.append(function)
            if function.__module__.startswith("trm_kernels."):
                found.add(function)
    return found


def test_no_function_is_left_out() -> None:
    assert defined() == CASES.keys() | REFUSED


@contextmanager
def runs(function: type[torch.autograd.Function]) -> Iterator[None]:
    """Assert that the function's forward runs inside the block."""
    forward, calls = function.forward, []
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(function, "forward", staticmethod(lambda *args: calls.append(1) or forward(*args)))
        yield
    assert calls


def agree(found: Leaves, expected: Leaves) -> None:
    """Compare loosely: errors lose complete gradients; rounding differs if only one call packs padding."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.norm() > 0.0, name
        assert relative_error(found[name], tensor) < 1e-5, name


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    ("function", "make"),
    [(function, make) for function, cases in CASES.items() for make in cases],
    ids=lambda value: value.__name__,
)
def test_gradients_are_those_of_a_plain_call(
    function: type[torch.autograd.Function], make: Callable[[str], Case], backend: str, device: str
) -> None:
    call, leaves = make("cpu" if function is _ShortAttention else device)  # which runs only on CPUs
    with runs(function):
        expected = results_and_gradients(call, leaves)
    agree(results_and_gradients(torch.compile(call, fullgraph=True, backend=backend), leaves), expected)


def results(net: TinyRecursiveNetwork, call: Callable[..., tuple[Tensor, ...]], states: Leaves) -> Leaves:
    """Return the results of ``call(**states)``, and the gradients of states and parameters."""
    net.zero_grad()
    leaves = {name: state.clone().requires_grad_() for name, state in states.items()}
    out = call(**leaves)
    torch.stack([tensor.square().sum() for tensor in out]).sum().backward()
    found = {f"output {i}": tensor.detach() for i, tensor in enumerate(out)}
    found |= {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, f"{name} received no gradient"
        found[name] = parameter.grad
    return found


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("recurse", [latent_recursion, deep_recursion], ids=lambda value: value.__name__)
def test_gradients_of_a_recursion_over_padding(
    recurse: Callable[..., tuple[Tensor, Tensor]], backend: str, device: str
) -> None:
    """Typical user code: nested Functions, packing inside, and calls without gradients before one with."""
    net = TinyRecursiveNetwork(8, 1, 2, backend=backend).to(device)
    mask = holes(device)[[0, 2]]
    numbers = {"n": 1, "T": 2} if recurse is deep_recursion else {"n": 1}

    def call(**states: Tensor) -> tuple[Tensor, Tensor]:
        return recurse(net, **states, **numbers, mask=mask)

    states = randn(device, x=(2, 5, 8), y=(2, 5, 8), z=(2, 5, 8))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    agree(results(net, compiled, states), results(net, call, states))


@pytest.mark.skipif(native_module.unavailable() is not None, reason="the native module is not built")
def test_the_native_backend_refuses_and_auto_is_correct() -> None:
    net = TinyRecursiveNetwork(16, 1, 2)
    states = {"x": torch.randn(2, 5, 16)}

    def call(x: Tensor) -> tuple[Tensor]:
        return (net(x),)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with use_backend("native"):
        with runs(NativeRecursion):
            expected = results(net, call, states)
        with pytest.raises(Exception, match="cannot trace the kernels"):
            compiled(**states)
    agree(results(net, compiled, states), expected)
