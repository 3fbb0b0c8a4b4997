"""Random sequences of changes of weights, with calls in between: a call computes with the current weights.

``tests/test_weight_changes.py`` tests each way alone, many times. Here ways follow one another, on
networks of every family, and with calls of every kind.
"""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tests.fuzz.cases import Outcome
from trm_kernels import (
    BackendError,
    ParameterAverage,
    TinyRecursiveNetwork,
    deep_recursion,
    frozen,
    native_module,
    use_backend,
)
from trm_kernels.prepared import FrozenError

_CHANGES = 8

Net = TinyRecursiveNetwork
#: Changes a network, or returns another one to call instead.
Change = Callable[[Net, random.Random], Net | None]

CHANGES: list[Change] = []


def change(function: Change) -> Change:
    CHANGES.append(function)
    return function


def _other(weight: Tensor) -> Tensor:
    """Other values of the same magnitude."""
    wide = weight.detach().float()
    return (0.5 * wide + 0.2 * torch.randn_like(wide)).to(weight.dtype)


def _one(net: Net, chance: random.Random) -> tuple[nn.Module, str, nn.Parameter]:
    """The module, name and value of a weight."""
    places = [(module, name) for module in net.modules() for name in module._parameters]
    module, name = chance.choice([(m, n) for m, n in places if m._parameters[n] is not None])
    weight = module._parameters[name]
    assert weight is not None
    return module, name, weight


@change
def optimizer_step(net: Net, chance: random.Random) -> None:
    options: dict[str, Any] = chance.choice(({"foreach": False}, {"foreach": True}, {"fused": True}))
    kind = chance.choice((torch.optim.SGD, torch.optim.AdamW))
    weights = [weight for weight in net.parameters() if weight.is_leaf]
    before = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
        weight.grad = torch.randn_like(weight)
    kind(weights, lr=0.1, **options).step()
    for weight, wanted in zip(weights, before, strict=True):
        weight.grad = None
        weight.requires_grad_(wanted)


@change
def data_replaced(net: Net, chance: random.Random) -> None:
    _, _, weight = _one(net, chance)
    weight.data = _other(weight)


@change
def copied_into(net: Net, chance: random.Random) -> None:
    _, _, weight = _one(net, chance)
    with chance.choice((torch.no_grad, torch.inference_mode))():
        weight.detach().copy_(_other(weight)) if chance.random() < 0.5 else weight.copy_(_other(weight))


@change
def view_written(net: Net, chance: random.Random) -> None:
    _, _, weight = _one(net, chance)
    flat = weight.data.view(-1) if weight.is_contiguous() else weight.data.reshape(-1)
    flat[chance.randrange(len(flat))] += 2.0
    weight.data.select(0, chance.randrange(weight.shape[0])).mul_(-1)


@change
def numpy_written(net: Net, chance: random.Random) -> None:
    _, _, weight = _one(net, chance)
    if weight.dtype != torch.bfloat16:  # NumPy has none
        weight.detach().numpy()[...] *= -1


@change
def storage_replaced(net: Net, chance: random.Random) -> None:
    _, _, weight = _one(net, chance)
    weight.detach().set_(_other(weight).contiguous())  # type: ignore[arg-type]
    with torch.no_grad():
        weight.set_(_other(weight).contiguous())  # type: ignore[arg-type]


@change
def state_loaded(net: Net, chance: random.Random) -> None:
    part: nn.Module = chance.choice((net, net.layers[0]))
    state = {name: _other(value) for name, value in part.state_dict().items()}
    part.load_state_dict(state, assign=chance.random() < 0.5)


@change
def cast_and_back(net: Net, chance: random.Random) -> None:
    before = next(net.parameters()).dtype
    net.to(chance.choice((torch.float64, torch.bfloat16)))
    _, _, weight = _one(net, chance)
    weight.data.mul_(-1)
    net.to(before)


@change
def swapped(net: Net, chance: random.Random) -> None:
    _, _, weight = _one(net, chance)
    torch.utils.swap_tensors(weight, nn.Parameter(_other(weight), weight.requires_grad))


@change
def parameter_set(net: Net, chance: random.Random) -> None:
    module, name, weight = _one(net, chance)
    setattr(module, name, nn.Parameter(_other(weight), weight.requires_grad))


@change
def parametrized(net: Net, chance: random.Random) -> None:
    module, name, weight = _one(net, chance)
    parametrize.register_parametrization(module, name, _Negative())
    weight.data.mul_(1.5)
    parametrize.remove_parametrizations(module, name, leave_parametrized=chance.random() < 0.5)


class _Negative(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return -weight


@change
def averaged(net: Net, chance: random.Random) -> None:
    average = ParameterAverage(net.parameters(), 0.5)
    for weight in net.parameters():
        weight.data.copy_(_other(weight))
    average.update()
    average.copy_to()


@change
def requires_grad_switched(net: Net, chance: random.Random) -> None:
    net.requires_grad_(chance.random() < 0.5)


@change
def copied(net: Net, chance: random.Random) -> Net:
    other: Net = copy.deepcopy(net)
    for module in (net, other):
        _one(module, chance)[2].data.mul_(-1)
    return chance.choice((net, other))


@change
def pickled(net: Net, chance: random.Random) -> Net:
    if chance.random() < 0.5:
        return pickle.loads(pickle.dumps(net))
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@change
def shared(net: Net, chance: random.Random) -> None:
    net.share_memory()
    _one(net, chance)[2].data.mul_(-1)


@change
def tied(net: Net, chance: random.Random) -> None:
    (_, _, one), (module, name, other) = _one(net, chance), _one(net, chance)
    if one.shape == other.shape:
        setattr(module, name, one)
        one.data.mul_(-1)


@change
def block_replaced(net: Net, chance: random.Random) -> None:
    block = copy.deepcopy(net.layers[-1])
    _one(block, chance)[2].data.mul_(-1)  # type: ignore[arg-type]
    net.layers[chance.randrange(len(net.layers))] = block


@change
def mode_switched(net: Net, chance: random.Random) -> None:
    net.train(chance.random() < 0.5)
    _one(net, chance)[2].data.neg_()


@change
def strided(net: Net, chance: random.Random) -> None:
    _, _, weight = _one(net, chance)
    if weight.ndim == 2:
        weight.data = _other(weight).T.contiguous().T


@change
def frozen_for_a_while(net: Net, chance: random.Random) -> None:
    net.eval()
    x = torch.randn(1, 4, net.config.d_model, dtype=next(net.parameters()).dtype)
    with frozen(net), torch.no_grad(), contextlib.suppress(BackendError):
        net(x)
        attempts: tuple[Callable[[], Any], ...] = (
            lambda: net.load_state_dict(net.state_dict()),
            net.train,
            net.double,
            net.share_memory,
        )
        try:
            chance.choice(attempts)()
        except FrozenError:
            pass
        else:
            raise AssertionError("a frozen network could be changed")
    _one(net, chance)[2].data.neg_()


@change
def not_a_number(net: Net, chance: random.Random) -> None:
    _, _, weight = _one(net, chance)
    weight.data.reshape(-1)[0] = float("nan")  # of a copy, if the weight is strided
    weight.data.select(0, 0).fill_(float("nan"))


class Weights:
    """The part of the weights."""

    def __call__(self, number: int, chance: random.Random) -> Outcome:
        """Change a network several times, and compare a call after each change with the eager reference."""
        torch.manual_seed(number)
        backend = "compile" if number % 200 == 199 else "triton" if number % 40 == 7 else "native"
        if backend == "native" and native_module.unavailable() is not None:
            return Outcome("", "native is unavailable")
        net, what = _network(chance, backend)
        done: list[str] = []
        kinds = {"computed": 0, "declined": 0}
        for _ in range(_CHANGES if backend == "native" else 2):
            fault = None
            try:
                # NaN only at the end: it would hide what follows.
                if len(done) > 1 and chance.random() < 0.2 and backend != "compile":
                    done.append(not_a_number.__name__)
                    not_a_number(net, chance)
                else:
                    one = chance.choice([c for c in CHANGES if c is not not_a_number])
                    done.append(one.__name__)
                    net = one(net, chance) or net
                kind, fault = _compare(net, backend, chance)
                kinds[kind] += 1
            except Exception as error:
                fault = f"{type(error).__name__}: {error}"
            if fault is not None:
                return Outcome(f"{backend}, {what}: {', '.join(done)}", "wrong", fault)
            if done[-1] == not_a_number.__name__:
                break
        return Outcome(f"{what}: {', '.join(done)}", max(kinds, key=kinds.__getitem__))


def _network(chance: random.Random, backend: str) -> tuple[Net, str]:
    family, mixer = chance.choice(
        (
            ("seed", "attention"),
            ("scratch", "attention"),
            ("paper", "attention"),
            ("scratch", "tokens"),
            ("paper", "tokens"),
        )
    )
    heads, layers = chance.choice((1, 2)), chance.choice((1, 2))
    width = 16 if backend != "native" else chance.choice((8, 16, 24, 40))
    net = Net(
        width,
        layers,
        heads,
        family=family,
        mixer=mixer,
        seq_len=4 if mixer == "tokens" else None,  # type: ignore[arg-type]
    ).eval()
    for weight in net.parameters():
        weight.data.add_(torch.randn_like(weight), alpha=0.1)
    if backend == "native" and chance.random() < 0.3:
        net.bfloat16()
    return net, f"{family} {mixer}, width {width}, {layers} layers, {heads} heads"


def _calls(net: Net, chance: random.Random) -> tuple[Callable[[Net], list[Tensor]], str]:
    """A random call of a network like ``net``."""
    config, dtype = net.config, next(net.parameters()).dtype
    batch, length = chance.choice((1, 2, 3)), config.seq_len or chance.choice((1, 4, 5))
    states = [torch.randn(batch, length, config.d_model).to(dtype) for _ in range(3)]
    mask = None
    if config.mixer == "attention" and chance.random() < 0.3:
        mask = torch.ones(batch, length)
        mask[0, length // 2 + 1 :] = 0
    n, T, seed = chance.choice((0, 1, 2)), chance.choice((1, 2)), chance.randrange(2**31)
    learns = chance.random() < 0.4

    def call(net: Net) -> list[Tensor]:
        torch.manual_seed(seed)
        kind = next(net.parameters()).dtype
        x, y, z = (state.to(kind, copy=True).requires_grad_(learns) for state in states)
        with contextlib.nullcontext() if learns else torch.no_grad():
            out = [net(x, mask)] if n == 0 else [*deep_recursion(net, x, y, z, n=n, T=T, mask=mask)]
        if not learns:
            return out
        wanted = [weight for weight in net.parameters() if weight.requires_grad and weight.is_leaf]
        directions = [torch.randn(o.shape).to(o.dtype) for o in out]
        gradients = torch.autograd.grad(out, [x, *wanted], directions, allow_unused=True)
        return out + [gradient for gradient in gradients if gradient is not None]

    return call, f"n {n}, T {T}, [{batch}, {length}], gradient {learns}, mask {mask is not None}"


def _compare(net: Net, backend: str, chance: random.Random) -> tuple[str, str | None]:
    """Whether the backend computed, and what is wrong with what it did."""
    call, what = _calls(net, chance)
    try:
        with use_backend(backend):
            ours = call(net)
            again = call(net) if backend == "native" else ours
    except BackendError:
        return "declined", None
    if any(weight.isnan().any() for weight in net.parameters()):
        # The reference may hide it: torch's attention on CPUs makes zeros of NaN queries and keys.
        return "computed", None if ours[0].isnan().any() else f"no NaN in the result of {what}"
    with use_backend("eager"):
        eager, truth = call(net), call(copy.deepcopy(net).double())
    for number, (expected, plain, *found) in enumerate(zip(truth, eager, ours, again, strict=True)):
        for result in found:
            if (fault := _difference(result, plain, expected)) is None:
                continue
            # A copy has no weights of before. If it gives the same bits, the problem is badly conditioned.
            with use_backend(backend):
                if torch.equal(result, call(copy.deepcopy(net))[number]):
                    continue
            return "computed", f"result {number} of {what}: {fault}"
    return "computed", None


def _difference(ours: Tensor, eager: Tensor, truth: Tensor) -> str | None:
    """The tolerance rule, with room for single samples: a stale weight changes the result far more."""
    found, plain, exact = (tensor.detach().double() for tensor in (ours, eager, truth))
    error, theirs = (found - exact).norm().item(), (plain - exact).norm().item()
    bound = 10 * theirs + 100 * torch.finfo(ours.dtype).eps * max(exact.norm().item(), 1e-2)
    return None if error <= bound else f"it differs by {error:.3g}, and rounding explains {bound:.3g}"
