"""What a candidate is made of: a network, and the recursion around it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import trm_kernels
from llm_trm.benchmark.original import OriginalNetwork
from llm_trm.benchmark.workloads import Case
from trm_kernels import reference

State = dict[str, Tensor]

#: (x, y, z), each [B, L, D], to the new (y, z).
Recursion = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass
class Model:
    """One candidate's network and its recursions.

    Attributes:
        net: Owns the parameters.
        latent: One latent recursion with the case's n.
        deep: One deep recursion with the case's n and T; the last of the T records gradients.
        call_flops: Operations of one call of the network, where they are not the case's own.
        options: What the recursions are given beside n and T (``latent_recursion``, ``deep_recursion``).
        needs_autocast: Whether parameters in float32 serve low-precision streams under autocast alone.
    """

    net: nn.Module
    latent: Recursion
    deep: Recursion
    call_flops: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    needs_autocast: bool = False


#: Makes a candidate's model for a case, with a copy of the given parameters.
Build = Callable[[Case, State], Model]


def with_state(build: Callable[[], nn.Module], state: State) -> nn.Module:
    """The module that ``build`` makes, with copies of the tensors of ``state``."""
    with torch.device("meta"):
        net = build()
    # Own copies: training candidates must not share gradients, nor warm the cache for each other.
    net.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    return net


def _scheduled(
    schedule: object, case: Case, net: nn.Module, call: Callable[..., Tensor], options: Mapping[str, Any]
) -> Model:
    latent, deep = (getattr(schedule, name) for name in ("latent_recursion", "deep_recursion"))
    return Model(
        net,
        functools.partial(latent, call, n=case.steps, **options),
        functools.partial(deep, call, n=case.steps, T=case.recursions, **options),
        options=options,
    )


def ours(backend: str, **options: Any) -> Build:
    """The drop-in network on a backend, under this library's recursion with the given options."""

    def build(case: Case, state: State) -> Model:
        make = functools.partial(trm_kernels.TinyRecursiveNetwork.from_config, case.config(), backend=backend)
        net = with_state(make, state)
        return _scheduled(trm_kernels, case, net, net, options)

    return build


def written_out(network: Callable[[Case], nn.Module], mode: str | None = None) -> Build:
    """A plain module under the recursion as it is usually written: x + y + z is added anew in every step.

    Args:
        network: Makes the module, whose state dict is that of the case's reference network.
        mode: Compile it under torch.compile in this mode; None leaves it eager.
    """

    def build(case: Case, state: State) -> Model:
        net = with_state(lambda: network(case), state)
        call = net if mode is None else torch.compile(net, mode=mode, dynamic=False, fullgraph=True)
        return _scheduled(reference, case, net, call, {})

    return build


def reference_network(case: Case) -> nn.Module:
    """The reference, of any family."""
    return reference.TinyRecursiveNetwork(case.config())


def original_network(case: Case) -> nn.Module:
    """The module that this project replaces (the seed family alone)."""
    return OriginalNetwork(case.config())
