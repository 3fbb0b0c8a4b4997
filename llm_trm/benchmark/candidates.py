"""The implementations to benchmark, and the reasons why some cannot run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llm_trm.benchmark import official, peers
from llm_trm.benchmark.models import (
    Build,
    Model,
    State,
    original_network,
    ours,
    reference_network,
    written_out,
)
from llm_trm.benchmark.steps import GraphStep, Inputs, Step, Timed
from llm_trm.benchmark.suites import Group
from llm_trm.benchmark.training import DeviceLoopStep, LoopStep, autocast_dtype
from llm_trm.benchmark.workloads import Case, Mode
from trm_kernels import TinyRecursiveNetwork, backends

GRAPH = "+graph"

MAX_AUTOTUNE = "max-autotune-no-cudagraphs"


@dataclass(frozen=True)
class Candidate:
    """One row of a table.

    Attributes:
        name: Name in ``--backends`` and in results.
        build: Function that builds its model.
        groups: The tables that show it by default.
        missing: Returns the reason why it cannot run in this process, with the remedy, or None.
        families: The block families that it supports.
        modes, dtypes: The cases in which it differs from related candidates.
        cuda_only: Why it only runs on CUDA, or None.
        graph: Whether the whole case is replayed as one CUDA graph.
        compiles: Compile time, relative to torch.compile with default settings on the network.
        differs: What it computes instead, if that is a different function of the same shape. The tolerance
            rule then does not apply, and its operations are counted separately.
        base: The candidate that this one replays or varies, which indicates its memory.
        trains: Whether it uses this library's own training step instead of the plain loop.
        coarser: Why it may exceed the tolerance rule (a narrower dtype, on request).
    """

    name: str
    build: Build
    groups: tuple[Group, ...] = ("main", "peers")
    missing: Callable[[], str | None] = lambda: None
    families: tuple[str, ...] = ("seed", "scratch", "paper")
    modes: tuple[Mode, ...] = ("forward", "train", "step")
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    cuda_only: str | None = None
    graph: bool = False
    compiles: float = 0.0
    differs: str | None = None
    coarser: str | None = None
    trains: bool = False
    base: str = "eager"

    def unavailable(self, device_type: str) -> str | None:
        """The reason why it cannot run on a device type in this process, or None."""
        if self.cuda_only is not None and device_type != "cuda":
            return f"{self.cuda_only}, not {device_type}"
        return self.missing()


def _backend(name: str, groups: tuple[Group, ...] = ("main", "peers"), **options: Any) -> Candidate:
    # Look up the backend on each call, because it may be re-registered.
    return Candidate(name, ours(name), groups, lambda: backends.BACKENDS[name].unavailable(), **options)


def _variant(candidate: Candidate, suffix: str, recursion: dict[str, Any], **changes: Any) -> Candidate:
    """The same backend with further options for its recursions."""
    name = f"{candidate.name}-{suffix}"
    build = ours(candidate.name, **recursion)
    return replace(candidate, name=name, build=build, base=candidate.name, **changes)


def _replayed(candidate: Candidate, groups: tuple[Group, ...] = ("main", "peers")) -> Candidate:
    return replace(
        candidate,
        name=candidate.name + GRAPH,
        groups=groups,
        base=candidate.name if candidate.base == "eager" else candidate.base,
        graph=True,
        cuda_only="CUDA graphs need a CUDA device",
    )


_FP8 = "the recursions that record no gradient round the operands of their matrix products to fp8 (e4m3)"

_EVERYWHERE: tuple[Group, ...] = ("main", "peers", "scaling")
_EAGER = _backend("eager", _EVERYWHERE)
_COMPILE = _backend("compile", _EVERYWHERE, compiles=1.0)
_TRITON = _backend("triton", _EVERYWHERE, trains=True)
#: max-autotune times all of Inductor's tilings for each matrix product.
_COMPILE_MAX = Candidate(
    "compile-max",
    written_out(reference_network, MAX_AUTOTUNE),
    ("peers",),
    cuda_only="max-autotune is measured on a CUDA device",
    compiles=5.0,
)
_PAPER = functools.partial(Candidate, groups=("peers",), families=("paper",))
_MIXER = functools.partial(
    Candidate,
    groups=("peers",),
    missing=lambda: peers.missing("tiny_recursive_model"),
    differs=peers.MIXER_DIFFERS,
)

#: Candidates by name, in the order of table rows.
CANDIDATES: dict[str, Candidate] = {
    candidate.name: candidate
    for candidate in (
        Candidate("original", written_out(original_network), families=("seed",)),
        _EAGER,
        _COMPILE,
        _COMPILE_MAX,
        _PAPER("official", official.model()),
        _PAPER("official+compile", official.model("level"), compiles=1.0),
        _PAPER(
            "official+compile-all",
            official.model("recursion"),
            cuda_only="one graph of 7 calls is compiled for a CUDA device",
            compiles=4.0,
        ),
        Candidate(
            "liger",
            peers.liger_model(),
            ("peers",),
            lambda: peers.missing("liger_kernel"),
            cuda_only="liger-kernel's Triton kernels need a CUDA device",
        ),
        _MIXER("tiny-recursive-model", peers.mixer_model()),
        _MIXER("tiny-recursive-model+compile", peers.mixer_model(compiled=True), compiles=1.0),
        _TRITON,
        _backend("native", _EVERYWHERE, trains=True),
        _replayed(_EAGER),
        _replayed(_COMPILE),
        _replayed(_COMPILE_MAX, ("peers",)),
        _replayed(_TRITON, _EVERYWHERE),
        _replayed(_variant(_TRITON, "fast", {"memory": "fast"}, modes=("train", "step"))),
        _replayed(_variant(_TRITON, "small", {"memory": "small"}, modes=("train", "step"))),
        _replayed(_variant(_TRITON, "fp8", {"precision": "fp8-nograd"}, coarser=_FP8, dtypes=("bfloat16",))),
    )
}


def candidates_for(case: Case, device_type: str, group: Group = "main") -> tuple[str, ...]:
    """The rows of a case's table, without graph replays on devices that do not support graphs."""
    return tuple(
        name
        for name, candidate in CANDIDATES.items()
        if group in candidate.groups
        and case.family in candidate.families
        and case.mode in candidate.modes
        and case.dtype in candidate.dtypes
        and (device_type == "cuda" or not candidate.graph)
    )


def unavailable(name: str, device_type: str) -> str | None:
    """The reason why candidate ``name`` cannot run in this process, or None."""
    reason = CANDIDATES[name].unavailable(device_type)
    if reason is None and name == "triton" and device_type == "cpu":
        return "the kernels run on a GPU; Triton's interpreter shows no speed"
    return reason


def refusal(case: Case, model: Model, inputs: Inputs, mask: Tensor | None = None) -> str | None:
    """The reason why the backend of ``model`` or its fused recursion cannot run the case, or None.

    Args:
        mask: The mask of the recursion [B, L], if any.
    """
    net = model.net
    if not isinstance(net, TinyRecursiveNetwork) or net.backend is None:
        return None
    dtype = autocast_dtype(case, model) if case.mode == "step" else None
    recursion = backends.BACKENDS[net.backend].recursion
    asked = backends.Recursion(case.steps, precision=model.options.get("precision"))
    for grad in (False,) if case.mode == "forward" else (False, True):
        states = [tensor.detach().requires_grad_(grad) for tensor in inputs[0]]
        with (
            torch.set_grad_enabled(grad),
            torch.autocast(states[0].device.type, dtype, enabled=dtype is not None),
        ):
            reason = backends.refusal(net.backend, net, states[0], mask)
            if reason is None and recursion is not None:
                reason = recursion.refuses(net, states, asked)
        if reason is not None:
            return reason
    return None


def build(name: str, case: Case, state: State, inputs: Inputs) -> Timed | str:
    """The step of candidate ``name``, or the reason why it cannot run the case."""
    candidate = CANDIDATES[name]
    reason = unavailable(name, inputs.head.device.type)
    if reason is not None:
        return reason
    if case.family not in candidate.families:
        return f"it has the {' and '.join(candidate.families)} family's block, not the {case.family} family's"
    model = candidate.build(case, state)
    reason = refusal(case, model, inputs)
    if reason is not None:
        return reason
    if case.mode == "step" and candidate.trains:
        from llm_trm.benchmark.library_step import LibraryStep

        return LibraryStep(case, model, inputs, capture=candidate.graph)
    if candidate.graph:
        return GraphStep((DeviceLoopStep if case.mode == "step" else Step)(case, model, inputs))
    return (LoopStep if case.mode == "step" else Step)(case, model, inputs)
