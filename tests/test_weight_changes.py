"""Every way of changing weights takes effect in the next call, on every backend and under graphs."""

from __future__ import annotations

import copy
import ctypes
import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, parametrize, prune, vector_to_parameters
from torch.nn.utils.parametrizations import weight_norm

from tests.graph_double import LaunchingCapturer
from trm_kernels import (
    BackendError,
    GraphCache,
    ParameterAverage,
    TinyRecursiveNetwork,
    deep_recursion,
    graphed,
    use_backend,
)

#: They write to the host's memory.
ON_THE_HOST = ("numpy", "ctypes_memory", "another_process")

#: Replacements of parameters for a single call, or None.
Replaced = dict[str, Tensor] | None
#: Changes the weights of a network; they differ at every ``yield``.
Way = Callable[[TinyRecursiveNetwork, int], Iterator[Replaced]]

WAYS: dict[str, Way] = {}


def way(function: Way) -> Way:
    WAYS[function.__name__] = function
    return function


def linear(net: nn.Module) -> nn.Linear:
    return net.layers[0].mlp[0]  # type: ignore[index, union-attr, return-value]


def other(weight: Tensor) -> Tensor:
    """Return different values of the same magnitude, for any number of repetitions."""
    return 0.5 * weight.detach() + 0.2 * torch.randn_like(weight)


def other_weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: other(value) for name, value in net.state_dict().items()}


@way
def a_lora_merged_and_restored(net: TinyRecursiveNetwork, rounds: int) -> Iterator[Replaced]:
    base = linear(net).weight.data
    for _ in range(rounds):
        down, up = torch.randn_like(base[:, :2]), torch.randn_like(base[:2])
        linear(net).weight.data = base + 0.3 * down @ up
        yield None
        linear(net).weight.data = base
        yield None


@way
def a_lora_merged_in_place(net: TinyRecursiveNetwork, rounds: int) -> Iterator[Replaced]:
    for _ in range(rounds):
        update = other(linear(net).weight)
        linear(net).weight.data += update
        yield None
        linear(net).weight.data -= update
        yield None


@way
def evolution_strategies(net: TinyRecursiveNetwork, rounds: int) -> Iterator[Replaced]:
    mean = parameters_to_vector(net.parameters()).clone()
    for _ in range(rounds):
        vector_to_parameters(other(mean), net.parameters())
        yield None
        vector_to_parameters(mean, net.parameters())
        yield None


@way
def new_parameters(net: TinyRecursiveNetwork, rounds: int) -> Iterator[Replaced]:
    base = linear(net).weight
    for _ in range(rounds):
        linear(net).weight = nn.Parameter(other(base))
        yield None
        linear(net).weight = base
        yield None


@way
def new_parameters_where_the_old_ones_lay(net: TinyRecursiveNetwork, rounds: int) -> Iterator[Replaced]:
    for _ in range(rounds):
        shape, device = linear(net).weight.shape, linear(net).weight.device
        del linear(net).weight
        linear(net).weight = nn.Parameter(0.3 * torch.randn(shape, device=device))
        yield None


@way
def plain_tensors_in_place_of_parameters(net: TinyRecursiveNetwork, rounds: int) -> Iterator[Replaced]:
    for _ in range(rounds):
        weight = linear(net).weight.detach()
        del linear(net).weight
        linear(net).weight = other(weight)
        yield None


@way
def new_modules(net: TinyRecursiveNetwork, rounds: int) -> Iterator[Replaced]:
    for _ in range(rounds):
        old = linear(net)
        net.layers[0].mlp[0] = nn.Linear(old.in_features, old.out_features, device=old.weight.device)
        yield None


@way
def new_blocks(net: TinyRecursiveNetwork, rounds: int) -> Iterator[Replaced]:
    for _ in range(rounds):
        block = copy.deepcopy(net.layers[0])
        block.load_state_dict(other_weights(block))
        net.layers[0] = block
        yield None


@way
def functional_call_with_one_weight(net: TinyRecursiveNetwork, rounds: int) -> Iterator[Replaced]:
    for _ in range(rounds):
        yield {"layers.0.mlp.0.weight": other(linear(net).weight)}
        yield None


@way
def functional_call_with_all_weights(net: TinyRecursiveNetwork, rounds: int) -> Iterator[Replaced]:
    for _ in range(rounds):
        yield other_weights(net)


@way
def an_average_copied_in(net: TinyRecursiveNetwork, rounds: int) -> Iterator[Replaced]:
    average = [other(weight) for weight in net.parameters()]
    raw = [weight.clone() for weight in net.parameters()]
    for _ in range(rounds):
        for values in (average, raw):
            for weight, value in zip(net.parameters(), values, strict=True):
                weight.data.copy_(value)
            yield None


@way
def an_average_of_this_package(net: TinyRecursiveNetwork, rounds: int) -> Iterator[Replaced]:
    for _ in range(rounds):
        average = ParameterAverage(net.parameters(), 0.5)
        for weight in net.parameters():
            weight.data.copy_(other(weight))
        average.update()
        yield None
        average.copy_to()
        yield None


@way
def an_average_swapped_in(net: TinyRecursiveNetwork, rounds: int) -> Iterator[Replaced]:
    outside = [other(weight) for weight in net.parameters()]
    for _ in range(2 * rounds):
        for number, weight in enumerate(net.parameters()):
            outside[number], weight.data = weight.data, outside[number]
        yield None


@way
def a_foreign_optimizer(net: TinyRecursiveNetwork, rounds: int) -> Iterator[Replaced]:
    for _ in range(rounds):
        for weight in net.parameters():
            weight.data.copy_(other(weight))
        yield None


@way
def one_number(net: TinyRecursiveNetwork, rounds: int) -> Iterator[Replaced]:
    for number in range(rounds):
        linear(net).weight.data[number % linear(net).out_features, 0] += 3.0
        yield None


@way
def rows_that_change_places(net: TinyRecursiveNetwork, rounds: int) -> Iterator[Replaced]:
    """The same values in another order."""
    for _ in range(rounds):
        linear(net).weight.data.copy_(linear(net).weight.data.roll(1, 0))
        yield None


@way
def matrices_that_change_places(net: TinyRecursiveNetwork, rounds: int) -> Iterator[Replaced]:
    for _ in range(rounds):
        first, second = (net.layers[i].mlp[0].weight for i in (0, 1))
        first.data, second.data = second.data, first.data
        yield None


@way
def a_matrix_that_is_transposed(net: TinyRecursiveNetwork, rounds: int) -> Iterator[Replaced]:
    for _ in range(rounds):
        weight = net.layers[0].self_attn.out_proj.weight
        weight.data = weight.data.T
        yield None


@way
def numpy(net: TinyRecursiveNetwork, rounds: int) -> Iterator[Replaced]:
    view = linear(net).weight.detach().numpy()
    for _ in range(rounds):
        view[...] = other(linear(net).weight).numpy()
        yield None


@way
def ctypes_memory(net: TinyRecursiveNetwork, rounds: int) -> Iterator[Replaced]:
    for _ in range(rounds):
        weight = linear(net).weight
        values = other(weight)
        ctypes.memmove(weight.data_ptr(), values.data_ptr(), values.nbytes)
        yield None


@way
def storages(net: TinyRecursiveNetwork, rounds: int) -> Iterator[Replaced]:
    for _ in range(rounds):
        weight = linear(net).weight
        weight.untyped_storage().copy_(other(weight).untyped_storage())
        yield None


@way
def set_to_another_storage(net: TinyRecursiveNetwork, rounds: int) -> Iterator[Replaced]:
    for _ in range(rounds):
        weight = linear(net).weight
        weight.set_(other(weight))  # type: ignore[arg-type]
        yield None


@way
def swapped_tensors(net: TinyRecursiveNetwork, rounds: int) -> Iterator[Replaced]:
    for _ in range(rounds):
        torch.utils.swap_tensors(linear(net).weight, nn.Parameter(other(linear(net).weight)))
        yield None


@way
def a_broadcast(net: TinyRecursiveNetwork, rounds: int) -> Iterator[Replaced]:
    """As on every rank except the sender's: c10d does not increment autograd's version counters."""
    for _ in range(rounds):
        for weight in net.parameters():
            sent = other(weight)
            before = weight._version
            with torch.autograd._unsafe_preserve_version_counter(weight):
                weight.copy_(sent)
            assert weight._version == before
        yield None


def _write(net: nn.Module) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(os.getpid())
    for weight in net.parameters():
        weight.data.copy_(other(weight))


@way
def another_process(net: TinyRecursiveNetwork, rounds: int) -> Iterator[Replaced]:
    net.share_memory()
    for _ in range(min(rounds, 3)):
        process = multiprocessing.get_context("fork").Process(target=_write, args=(net,))
        process.start()
        process.join()
        assert process.exitcode == 0
        yield None


@way
def a_fused_optimizer_called_directly(net: TinyRecursiveNetwork, rounds: int) -> Iterator[Replaced]:
    weights = [weight.detach() for weight in net.parameters()]
    for step in range(1, rounds + 1):
        zeros = [torch.zeros_like(weight) for weight in weights]
        torch._fused_adamw_(
            weights,
            [torch.randn_like(weight) for weight in weights],
            zeros,
            [torch.zeros_like(weight) for weight in weights],
            [],
            [torch.tensor(float(step), device=weight.device) for weight in weights],
            lr=0.1,
            beta1=0.9,
            beta2=0.99,
            weight_decay=0.0,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )
        yield None


@way
def an_optimizer(net: TinyRecursiveNetwork, rounds: int) -> Iterator[Replaced]:
    optimizers = [
        torch.optim.AdamW(net.parameters(), lr=0.1, **options)
        for options in ({"foreach": False}, {"foreach": True}, {"fused": True})
    ]
    for number in range(rounds):
        for weight in net.parameters():
            weight.grad = torch.randn_like(weight)
        optimizers[number % 3].step()
        yield None


@way
def load_state_dict(net: TinyRecursiveNetwork, rounds: int) -> Iterator[Replaced]:
    for _ in range(rounds):
        net.load_state_dict(other_weights(net))
        yield None


@way
def load_state_dict_assigned(net: TinyRecursiveNetwork, rounds: int) -> Iterator[Replaced]:
    for _ in range(rounds):
        net.load_state_dict(other_weights(net), assign=True)
        yield None


@way
def load_state_dict_of_a_block(net: TinyRecursiveNetwork, rounds: int) -> Iterator[Replaced]:
    for _ in range(rounds):
        net.layers[1].load_state_dict(other_weights(net.layers[1]))
        yield None


@way
def tied_matrices(net: TinyRecursiveNetwork, rounds: int) -> Iterator[Replaced]:
    net.layers[1].mlp[0].weight = linear(net).weight
    for _ in range(rounds):
        net.layers[1].mlp[0].weight.data.copy_(other(linear(net).weight))
        yield None


class _Scaled(nn.Module):
    factor = 1.0

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.factor


@way
def a_parametrization(net: TinyRecursiveNetwork, rounds: int) -> Iterator[Replaced]:
    scaled = _Scaled()
    parametrize.register_parametrization(linear(net), "weight", scaled)
    for _ in range(rounds):
        original = linear(net).parametrizations.weight.original
        original.data.copy_(other(original))
        yield None
    parametrize.remove_parametrizations(linear(net), "weight")
    linear(net).weight.data.mul_(-1.0)
    yield None


@way
def weight_norm_put_on_and_off(net: TinyRecursiveNetwork, rounds: int) -> Iterator[Replaced]:
    for _ in range(rounds):
        weight_norm(linear(net))
        linear(net).parametrizations.weight.original0.data.mul_(-1.5)
        yield None
        parametrize.remove_parametrizations(linear(net), "weight")
        linear(net).weight.data.mul_(-1.0)
        yield None


@way
def pruning(net: TinyRecursiveNetwork, rounds: int) -> Iterator[Replaced]:
    for _ in range(rounds):
        prune.random_unstructured(linear(net), "weight", 0.5)
        yield None
        prune.remove(linear(net), "weight")
        linear(net).weight.data = torch.randn_like(linear(net).weight)
        yield None


@way
def casts(net: TinyRecursiveNetwork, rounds: int) -> Iterator[Replaced]:
    for _ in range(rounds):
        net.double()
        linear(net).weight.data.copy_(other(linear(net).weight))
        net.float()
        yield None


@way
def training_and_back(net: TinyRecursiveNetwork, rounds: int) -> Iterator[Replaced]:
    for _ in range(rounds):
        net.train()
        for weight in net.parameters():
            weight.data.copy_(other(weight))
        net.eval()
        yield None


class _Model(nn.Module):
    """The module for ``functional_call``: the parts of a call that read weights."""

    def __init__(self, net: TinyRecursiveNetwork, run: Callable[..., Any]) -> None:
        super().__init__()
        self.net, self.run = net, run

    def forward(self, *states: Tensor) -> Tensor:
        found: Tensor = self.run(self.net, *states)
        return found


def one_call(net: TinyRecursiveNetwork, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    out: Tensor = net(x)
    return out


def recursion(net: TinyRecursiveNetwork, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return deep_recursion(net, x, y, z, 1, 1)[0]


def graph(net: TinyRecursiveNetwork) -> Callable[..., Tensor]:
    fast = graphed(net, 1, 1, cache=GraphCache(capturer=LaunchingCapturer()))
    return lambda net, *states: fast(*states)[0]


def outcome(model: nn.Module, replaced: Replaced, states: tuple[Tensor, ...], backend: str) -> Tensor:
    with torch.no_grad(), use_backend(backend):
        weights = {f"net.{name}": value for name, value in (replaced or {}).items()}
        found: Tensor = torch.func.functional_call(model, weights, states)
        return found.clone()


@pytest.mark.parametrize(
    ("backend", "rounds"),
    [
        ("eager", 20),
        pytest.param("compile", 3, marks=pytest.mark.slow),
        ("native", 20),
        pytest.param("triton", 2, marks=pytest.mark.interpreter),
        ("graphs", 20),
    ],
)
@pytest.mark.parametrize("name", WAYS)
def test_every_change_is_detected(name: str, backend: str, rounds: int, device: str) -> None:
    if backend != "triton":
        device = "cpu"
    elif device == "cuda" and name in ON_THE_HOST:
        pytest.skip("the weights are on a GPU")
    torch.manual_seed(0)
    torch.compiler.reset()  # it recompiles at most eight times
    net = TinyRecursiveNetwork(16, 2, 1).to(device).eval().requires_grad_(False)
    states = torch.randn(3, 1, 4, 16, device=device).unbind()
    runs = {one_call: one_call, recursion: recursion}
    if backend == "graphs":
        backend, runs = "eager", {graph(net): recursion}
    moments, before = 0, None
    for replaced in _with_the_beginning(WAYS[name](net, rounds)):
        for run, plain in runs.items():
            truth = outcome(_Model(net, plain), replaced, states, "eager")
            for _ in range(1 if backend == "triton" else 2):
                try:
                    ours = outcome(_Model(net, run), replaced, states, backend)
                except BackendError:  # reported, and never for the initial weights
                    assert moments > 0
                    continue
                torch.testing.assert_close(ours, truth, rtol=1e-3, atol=1e-4)
        assert before is None or (truth - before).abs().max() > 1e-2, "nothing has changed"
        moments, before = moments + 1, truth
    assert moments > 2


def _with_the_beginning(changes: Iterator[Replaced]) -> Iterator[Replaced]:
    yield None
    yield from changes


@pytest.mark.parametrize("backend", ["eager", "native"])
def test_a_broadcast_between_processes_is_seen(backend: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(rank, backend, tmp_path / "store")) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 0]


def _rank(rank: int, backend: str, store: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group("gloo", store=dist.FileStore(str(store), 2), rank=rank, world_size=2)
    net = TinyRecursiveNetwork(16, 2, 1).eval().requires_grad_(False)
    x = torch.randn(1, 4, 16)
    before = outcome(net, None, (x,), backend)
    for weight in net.parameters():
        dist.broadcast(weight, 0)
    after = outcome(net, None, (x,), backend)
    torch.testing.assert_close(after, outcome(net, None, (x,), "eager"), rtol=1e-3, atol=1e-4)
    assert torch.equal(before, after) == (rank == 0)
