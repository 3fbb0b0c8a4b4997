"""Checks correctness on a device, one aspect at a time in a few seconds. Failures raise AssertionError.

Results must satisfy the tolerance rule of :mod:`trm_kernels.testing`: the error against float64 is at most
twice eager's in the same dtype.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.fp8.emulation import EmulatedNetwork
from trm_kernels import Packing, TinyRecursiveNetwork, deep_recursion, latent_recursion, reference
from trm_kernels.graphs import graphed
from trm_kernels.optim.averaging import ParameterAverage
from trm_kernels.optim.capturable import capturable_adamw
from trm_kernels.testing import ToleranceRule, recursion_and_gradients, relative_error
from trm_kernels.training import TrainingStep


@dataclass(frozen=True)
class Sizes:
    """Sizes for the checks.

    Attributes:
        length: Not a multiple of a tile, so that edges are masked.
        n, T: Small, so that eager in float64 is fast.
    """

    batch: int = 8
    length: int = 97
    width: int = 256
    heads: int = 4
    n: int = 2
    T: int = 2


#: The paper's length, with its 16 puzzle positions, and phase 2's width.
SIZES = Sizes()


@dataclass(frozen=True)
class Setting:
    """Settings of the checks.

    Attributes:
        device: A CUDA device; the tests use the CPU with Triton's interpreter.
        dtype: Dtype of operands, and by default of the residual stream.
        repeats: Number of repetitions of the same computation.
        steps: Number of training steps, plain and captured.
    """

    device: torch.device
    sizes: Sizes = SIZES
    dtype: torch.dtype = torch.bfloat16
    repeats: int = 20
    steps: int = 10


#: A check: returns metrics to record, or raises AssertionError if a result is wrong.
Check = Callable[[Setting], dict[str, Any]]

#: The states x, y, z.
States = tuple[Tensor, Tensor, Tensor]


def _network(setting: Setting, family: str, **options: Any) -> TinyRecursiveNetwork:
    """A float32 network with scaled-down weights, since a newly initialised one amplifies rounding errors."""
    sizes = setting.sizes
    if options.get("mixer") == "tokens":
        options["seq_len"] = sizes.length
    net = TinyRecursiveNetwork(sizes.width, 2, sizes.heads, family=family, **options)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))  # ones and zeros would hide errors
            else:
                parameter.mul_(0.5)
    return net.to(setting.device)


def _states(setting: Setting, dtype: torch.dtype) -> States:
    sizes = setting.sizes
    shape = sizes.batch, sizes.length, sizes.width
    x, y, z = (torch.randn(shape, device=setting.device).to(dtype) for _ in range(3))
    return x, y, z


def _wide(states: States) -> States:
    x, y, z = (state.double() for state in states)
    return x, y, z


def _mask(setting: Setting) -> Tensor:
    """A mask for samples of different lengths [B, L]."""
    sizes = setting.sizes
    lengths = torch.randint(1, sizes.length + 1, (sizes.batch, 1))
    lengths[0] = sizes.length
    return (torch.arange(sizes.length) < lengths).to(setting.device)


def _found(
    net: TinyRecursiveNetwork, states: States, output_norm: nn.Module | None = None, **options: Any
) -> dict[str, Tensor]:
    """Outputs and gradients of a deep recursion by name, for one direction."""
    shape, device = states[0].shape, states[0].device
    direction = torch.linspace(-1, 1, shape.numel(), device=device).view(shape)
    found = recursion_and_gradients(net, output_norm, states, [direction, direction], **options)
    assert "x" in found, "no gradient of x"
    return found


def _errors(rule: ToleranceRule) -> dict[str, Any]:
    """Check the rule, and return the largest error against float64 with eager's error."""
    rule.check()
    worst = max(rule.pools.values(), key=lambda pools: pools[0].error)
    return {"error": worst[0].error, "eager": worst[1].error}


def _check_rule(
    setting: Setting,
    family: str,
    *,
    autocast: bool = False,
    normed: bool = False,
    masked: bool = False,
    packed: bool = False,
    memories: tuple[str, ...] = ("balanced",),
    **network: Any,
) -> dict[str, Any]:
    """Compare a deep recursion on the ``triton`` backend, eager, and eager in float64."""
    held = torch.float32 if autocast else setting.dtype
    ours = _network(setting, family, **network).to(held)
    eager, truth = copy.deepcopy(ours), copy.deepcopy(ours).double()
    ours.backend, eager.backend, truth.backend = "triton", "eager", "eager"
    options: dict[str, Any] = {"n": setting.sizes.n, "T": setting.sizes.T}
    if masked or packed:
        options["mask"] = _mask(setting)
    norm = None
    if normed:
        norm = reference.RMSNorm(setting.sizes.width, 1e-6).to(setting.device, held)
        nn.init.normal_(norm.weight, 1.0, 0.2)
    states = _states(setting, held)
    context = torch.autocast(setting.device.type, setting.dtype) if autocast else nullcontext()
    wide = None if norm is None else copy.deepcopy(norm).double()
    right = _found(truth, _wide(states), output_norm=wide, **options)
    with context:
        theirs = _found(eager, states, output_norm=norm, **options)
    rule = ToleranceRule(setting.dtype)
    for memory in memories:
        given = options | ({"mask": Packing.of(options["mask"])} if packed else {})
        with context:
            mine = _found(ours, states, output_norm=norm, memory=memory, **given)
        assert mine.keys() == right.keys()
        for name, expected in right.items():
            rule.add(f"{memory} {name}", mine[name], theirs[name], expected)
    return _errors(rule)


def _family(family: str, **network: Any) -> Check:
    def check(setting: Setting) -> dict[str, Any]:
        return _check_rule(setting, family, memories=("balanced", "fast", "small"), **network)

    return check


def _variant(family: str, **options: Any) -> Check:
    def check(setting: Setting) -> dict[str, Any]:
        return _check_rule(setting, family, **options)

    return check


def _dropout(setting: Setting) -> dict[str, Any]:
    """Equal seeds give equal results, forward and backward, other seeds differ, and the change is small."""
    net = _network(setting, "seed", dropout=0.1).to(setting.dtype).train()
    net.backend = "triton"
    states = _states(setting, setting.dtype)
    options: dict[str, Any] = {"n": setting.sizes.n, "T": 1}

    def drawn(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return _found(net, states, **options)

    one, again, other = drawn(0), drawn(0), drawn(1)
    for name, expected in one.items():
        assert torch.equal(again[name], expected), f"the same seed gave a different {name}"
    assert (one["new y"] != other["new y"]).any(), "a different seed gave the same output"
    plain = _found(net.eval(), states, **options)["new y"]
    change = relative_error(one["new y"], plain)
    assert change < 1.0, f"dropout of 0.1 changed the output by {change:.2f} of its norm"
    return {"change": change}


def _fp8(setting: Setting) -> dict[str, Any]:
    """Recursions in fp8 are as accurate as their emulation by the rule, relative to a float32 emulation."""
    from trm_kernels.ops._launch import LAUNCHES

    net = _network(setting, "seed").to(setting.dtype).eval()
    net.backend = "triton"
    x, y, z = _states(setting, setting.dtype)
    n = setting.sizes.n
    before = LAUNCHES["quantise_rows_kernel"]
    with torch.no_grad():
        found = latent_recursion(net, x, y, z, n, precision="fp8-nograd")
        assert LAUNCHES["quantise_rows_kernel"] > before, "nothing was rounded to fp8"
        emulated = latent_recursion(EmulatedNetwork(net), x, y, z, n)
        full = latent_recursion(net, x, y, z, n)
        truth = latent_recursion(EmulatedNetwork(net.float()), x.float(), y.float(), z.float(), n)
    rule = ToleranceRule(setting.dtype)
    for name, *results in zip("yz", found, emulated, truth, strict=True):
        rule.add(name, *results)
    return _errors(rule) | {"off full precision": relative_error(found[0], full[0])}


def _graph(setting: Setting) -> dict[str, Any]:
    """Replays on new inputs and changed weights are bitwise equal to plain calls."""
    net = _network(setting, "seed").to(setting.dtype).eval()
    net.backend = "triton"
    sizes = setting.sizes
    replayed = graphed(net, n=sizes.n, T=sizes.T)
    with torch.no_grad():
        for call in range(6):
            states = _states(setting, setting.dtype)
            if call == 4:
                for parameter in net.parameters():
                    parameter.mul_(0.9)
            found = replayed(*states)
            expected = deep_recursion(net, *states, sizes.n, sizes.T)
            for one, other in zip(found, expected, strict=True):
                assert torch.equal(one, other), f"call {call} differs from a plain one"
    status = replayed.graphed.cache.status()
    assert setting.device.type != "cuda" or status.replays > 0, f"never replayed: {status.fallbacks}"
    return {"replays": status.replays}


def _training(setting: Setting) -> dict[str, Any]:
    """Captured training steps give the same parameters as plain steps."""
    start = _network(setting, "seed").train()
    x, _, _ = _states(setting, torch.float32)
    labels = torch.randint(11, x.shape[:2], device=setting.device)
    head = torch.randn(11, setting.sizes.width, device=setting.device)

    def trained(capture: bool) -> tuple[list[Tensor], Any]:
        net = copy.deepcopy(start)
        net.backend = "triton"
        optimizer = capturable_adamw(net.parameters(), 1e-3)

        def loss(y: Tensor, z: Tensor, x: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            logits = nn.functional.linear(y.float(), head)
            return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), {}

        step = TrainingStep(
            net,
            loss,
            optimizer,
            n=setting.sizes.n,
            T=setting.sizes.T,
            clip_norm=1.0,
            average=ParameterAverage(net.parameters(), 0.9),
            autocast_dtype=setting.dtype,
            max_steps=3,
            capture=capture,
        )
        for _ in range(setting.steps):
            step(x, labels)
        return [parameter.detach() for parameter in net.parameters()], step.cache.status()

    (plain, _), (captured, status) = trained(False), trained(True)
    before = [parameter.detach() for parameter in start.parameters()]
    assert all(torch.isfinite(parameter).all() for parameter in captured), "a parameter is not finite"
    assert all((one != other).any() for one, other in zip(captured, before, strict=True)), (
        "one did not change"
    )
    # A wrongly captured step (an old batch, a lost gradient) is off by as much as it moves. Bitwise equality
    # is expected but only recorded: cuBLAS may choose other kernels in a capture, and AdamW amplifies that.
    off = float(_distance(captured, plain) / _distance(plain, before))
    assert off <= 0.05, f"captured steps differ from plain ones by {off:.2g} of their norm"
    assert setting.device.type != "cuda" or status.replays > 0, f"never replayed: {status.fallbacks}"
    equal = all(torch.equal(one, other) for one, other in zip(captured, plain, strict=True))
    return {"replays": status.replays, "equal": equal, "off": off}


def _distance(ones: list[Tensor], others: list[Tensor]) -> Tensor:
    squares = [(one.double() - other).square().sum() for one, other in zip(ones, others, strict=True)]
    return torch.stack(squares).sum().sqrt()


def _repeats(setting: Setting) -> dict[str, Any]:
    """Repetitions of the same step are bitwise equal; any difference is a race."""
    net = _network(setting, "paper").to(setting.dtype)
    net.backend = "triton"
    states = _states(setting, setting.dtype)
    options: dict[str, Any] = {"n": setting.sizes.n, "T": 1, "mask": _mask(setting)}
    first = _found(net, states, **options)
    for repeat in range(setting.repeats):
        for name, tensor in _found(net, states, **options).items():
            assert torch.equal(tensor, first[name]), f"repeat {repeat}: a different {name}"
    return {"repeats": setting.repeats}


def _single(setting: Setting) -> dict[str, Any]:
    """Without gradients: one network call, one latent recursion, and a deep recursion that reads few rows."""
    net = _network(setting, "seed").to(setting.dtype).eval()
    eager, truth = copy.deepcopy(net), copy.deepcopy(net).double()
    net.backend, eager.backend, truth.backend = "triton", "eager", "eager"
    states = _states(setting, setting.dtype)
    read = torch.zeros(setting.sizes.batch, 1, dtype=torch.long, device=setting.device)
    rule = ToleranceRule(setting.dtype)

    def results(net: TinyRecursiveNetwork, states: States) -> Iterator[tuple[str, Tensor]]:
        yield "network", net(states[0])
        y, z = latent_recursion(net, *states, setting.sizes.n)
        yield "y", y
        yield "z", z
        yield "read", deep_recursion(net, *states, setting.sizes.n, setting.sizes.T, read=read)[0]

    with torch.no_grad():
        found = (results(n, s) for n, s in ((net, states), (eager, states), (truth, _wide(states))))
        for (name, mine), (_, theirs), (_, expected) in zip(*found, strict=True):
            rule.add(name, mine, theirs, expected)
    return _errors(rule)


#: Checks by name, most informative first.
CHECKS: dict[str, Check] = {
    "seed": _family("seed"),
    "paper": _family("paper"),
    "paper-tokens": _family("paper", mixer="tokens"),
    "scratch": _family("scratch"),
    "scratch-tokens": _family("scratch", mixer="tokens"),
    "inference": _single,
    "autocast": _variant("seed", autocast=True),
    "output norm": _variant("seed", normed=True),
    "masked": _variant("paper", masked=True),
    "packed": _variant("seed", packed=True, memories=("balanced", "small")),
    "dropout": _dropout,
    "fp8": _fp8,
    "graph": _graph,
    "training": _training,
    "repeats": _repeats,
}
