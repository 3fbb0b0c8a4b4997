"""The candidates of ``bench/cpu.py``, and the reasons why some cannot run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor

from bench.cpu_cases import CpuCase
from bench.plain_trainer import PlainNetwork
from llm_trm.benchmark import candidates
from llm_trm.benchmark.models import Model, State, original_network, ours, reference_network, with_state
from llm_trm.benchmark.steps import Inputs, Step
from llm_trm.benchmark.workloads import Case
from llm_trm.models.sequence_trm import SequenceTRMConfig
from trm_kernels import TinyRecursiveNetwork, backends, reference

EAGER, ORIGINAL, NATIVE = "eager", "original", "native"

#: Builds a candidate's model with a copy of the given parameters; the mask [B, L] is None for fixed lengths.
Build = Callable[[CpuCase, State, Tensor | None], Model]


@dataclass(frozen=True)
class Candidate:
    """One row of a case.

    Attributes:
        build: Function that builds its model.
        summary: One line for the docs.
        families: The block families that it supports.
        inference_only: Whether it has no backward pass.
        ragged_only: Whether it differs from ``eager`` only for ragged lengths.
        preparing: Context manager for its first call.
    """

    build: Build
    summary: str
    families: tuple[str, ...] = ("seed", "scratch", "paper")
    inference_only: bool = False
    ragged_only: bool = False
    preparing: Callable[[], AbstractContextManager[Any]] = nullcontext


def written_out(network: Callable[[Case], nn.Module], *, compiled: bool = False) -> Build:
    """A plain module on the padded batch, with the recursion of :mod:`trm_kernels.reference`."""

    def build(work: CpuCase, state: State, mask: Tensor | None) -> Model:
        case = work.case
        net = with_state(lambda: network(case), state)
        function = torch.compile(net, dynamic=False, fullgraph=True) if compiled else net
        call = function if mask is None else functools.partial(function, mask=mask)
        return Model(
            net,
            functools.partial(reference.latent_recursion, call, n=case.steps),
            functools.partial(reference.deep_recursion, call, n=case.steps, T=case.recursions),
        )

    return build


def _original(work: CpuCase, state: State, mask: Tensor | None) -> Model:
    if mask is None:
        return written_out(original_network)(work, state, None)
    return written_out(_original_with_mask)(work, state, mask)


def _original_with_mask(case: Case) -> nn.Module:
    return PlainNetwork(SequenceTRMConfig(case.hidden_size, case.layers, case.heads))


def _backend(name: str) -> Build:
    def build(work: CpuCase, state: State, mask: Tensor | None) -> Model:
        return ours(name, mask=mask)(work.case, state)

    return build


def _freezing() -> AbstractContextManager[Any]:
    # torch.compile's ``options`` do not work: dynamo itself reads this setting, and without it no weight is
    # prepacked (0 of 8 matrix products instead of 8; torch 2.13).
    return inductor.patch(freezing=True)


#: Candidates by name, in the order of table rows.
CANDIDATES: dict[str, Candidate] = {
    ORIGINAL: Candidate(
        _original,
        "`nn.MultiheadAttention` asked for its weights, as in the model that this project re-creates",
        families=("seed",),
    ),
    EAGER: Candidate(
        written_out(reference_network),
        "the same rewritten for `scaled_dot_product_attention`: the reference, padded, with a mask",
    ),
    "compile": Candidate(
        _backend("compile"), "the `compile` backend: the reference under torch.compile, ragged rows packed"
    ),
    "freezing": Candidate(
        written_out(reference_network, compiled=True),
        "the reference under torch.compile with Inductor's `freezing`: weights are constants, prepacked",
        inference_only=True,
        preparing=_freezing,
    ),
    "packed": Candidate(_backend("eager"), "the `eager` backend, which packs ragged rows", ragged_only=True),
    NATIVE: Candidate(_backend(NATIVE), "the `native` backend: the C++ kernels"),
}


def names_for(work: CpuCase) -> tuple[str, ...]:
    """The candidates of a case."""
    return tuple(
        name
        for name, candidate in CANDIDATES.items()
        if work.case.family in candidate.families
        and (work.case.mode == "forward" or not candidate.inference_only)
        and (work.ragged or not candidate.ragged_only)
    )


def build(name: str, work: CpuCase, state: State, inputs: Inputs, mask: Tensor | None) -> Step | str:
    """The step of a candidate, or the reason why it cannot run the case."""
    if name in backends.BACKENDS and (reason := backends.BACKENDS[name].unavailable()) is not None:
        return reason
    model = CANDIDATES[name].build(work, state, mask)
    reason = candidates.refusal(work.case, model, inputs, mask)
    if reason is None and CANDIDATES[name].ragged_only:
        reason = _refuses_packed(model.net, inputs, mask)
    return Step(work.case, model, inputs) if reason is None else reason


def _refuses_packed(net: nn.Module, inputs: Inputs, mask: Tensor | None) -> str | None:
    assert isinstance(net, TinyRecursiveNetwork)
    assert mask is not None
    packed = backends.BACKENDS["eager"].packed
    if packed is None:
        return "the eager backend packs no rows"
    return packed.refuses(net, inputs[0], backends.Recursion(1, mask=mask))
