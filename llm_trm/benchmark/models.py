"""The parts of a candidate: a network, and the recursion around it."""

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

#: Maps (x, y, z), each [B, L, D], to the new (y, z).
Recursion = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass
class Model:
    """One candidate's network and its recursions.

    Attributes:
        net: The network, which owns the parameters.
        latent: One latent recursion with the case's n.
        deep: One deep recursion with the case's n and T; the last of the T records gradients.
        call_flops: Operations of one call of the network, if they differ from the case's.
        options: Further options of ``latent_recursion`` and ``deep_recursion``.
        needs_autocast: Whether float32 parameters need autocast to process low-precision streams.
    """

    net: nn.Module
    latent: Recursion
    deep: Recursion
    call_flops: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    needs_autocast: bool = False


#: Builds a candidate's model for a case, with a copy of the given parameters.
Build = Callable[[Case, State], Model]


def with_state(build: Callable[[], nn.Module], state: State) -> nn.Module:
    """The module that ``build`` returns, with copies of the tensors of ``state``."""
    with torch.device("meta"):
        net = build()
    # Copy, because candidates must not share gradients or warm the cache for each other.
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
    """The drop-in network on a backend, with this library's recursion and the given options."""

    def build(case: Case, state: State) -> Model:
        make = functools.partial(trm_kernels.TinyRecursiveNetwork.from_config, case.config(), backend=backend)
        net = with_state(make, state)
        return _scheduled(trm_kernels, case, net, net, options)

    return build


def written_out(network: Callable[[Case], nn.Module], mode: str | None = None) -> Build:
    """A plain module in the usual form of the recursion, which adds x + y + z in every step.

    Args:
        network: Builds the module, which has the state dict of the case's reference network.
        mode: Mode of torch.compile; None for eager mode.
    """

    def build(case: Case, state: State) -> Model:
        net = with_state(lambda: network(case), state)
        call = net if mode is None else torch.compile(net, mode=mode, dynamic=False, fullgraph=True)
        return _scheduled(reference, case, net, call, {})

    return build


def reference_network(case: Case) -> nn.Module:
    """The reference network of the case's family."""
    return reference.TinyRecursiveNetwork(case.config())


def original_network(case: Case) -> nn.Module:
    """The module that this project replaces (only for the seed family)."""
    return OriginalNetwork(case.config())
