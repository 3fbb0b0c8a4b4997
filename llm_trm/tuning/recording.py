"""Records the products of a recursion from its launchers, on tensors without data."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from llm_trm.benchmark.workloads import Case
from llm_trm.tuning.calls import RecordedCall, describe
from trm_kernels import TinyRecursiveNetwork
from trm_kernels.backends.checks import block_parameters, layout_name
from trm_kernels.ops import dispatch, recursion
from trm_kernels.ops._launch import Target, record
from trm_kernels.ops.activation_gradient import activation_gradient
from trm_kernels.ops.dispatch import chosen_by
from trm_kernels.ops.gemm import gemm
from trm_kernels.ops.tiles import Choice, Problem, heuristic
from trm_kernels.ops.weight_gradient import WeightGradient

#: Functions that request one choice and compute the whole problem.
LAUNCHERS: tuple[Callable[..., Any], ...] = (gemm, activation_gradient)

#: Compute capability, times ten, from which recursions without gradient may run in fp8.
_FIRST_WITH_FP8 = 90


def record_cases(cases: Sequence[Case], target: Target, *, fp8: bool = True) -> list[RecordedCall]:
    """Record the launcher calls of the cases, one per distinct problem of a table.

    Of several calls of the same problem, the one with the most tensors is kept, since its epilogue does the
    most. bfloat16 cases include recursions in fp8 if the target supports it, unless ``fp8`` is False.
    """
    found: dict[str, RecordedCall] = {}
    for case in cases:
        for call in _calls(case, target, fp8):
            name = dispatch.key(call.problem)
            if name not in found or len(call.tensors) > len(found[name].tensors):
                found[name] = call
    return list(found.values())


def _calls(case: Case, target: Target, fp8: bool) -> list[RecordedCall]:
    calls: list[RecordedCall] = []
    running: list[tuple[Callable[..., Any], Any, Any]] = []

    def choose(problem: Problem, _: Target) -> Choice:
        assert running, f"{problem.kernel} was requested by a launcher that the tuner does not know"
        launcher, args, kwargs = running[-1]
        calls.append(RecordedCall(problem, launcher.__module__, launcher.__qualname__, args, kwargs))
        return heuristic(problem, target)

    def watch(launcher: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            running.append((launcher, describe(args), {name: describe(v) for name, v in kwargs.items()}))
            try:
                return launcher(*args, **kwargs)
            finally:
                running.pop()

        return call

    with _replaced(watch), record(target), chosen_by(choose), torch.no_grad():
        _run(case, target, fp8)
    return calls


@contextmanager
def _replaced(watch: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Replace every reference to a launcher by ``watch(launcher)``, so that launchers need no hooks."""
    modules = [module for name, module in sys.modules.items() if name.startswith("trm_kernels.ops.")]
    found: list[tuple[Any, str, Callable[..., Any]]] = [(WeightGradient, "add", WeightGradient.add)]
    for module in modules:
        named = list(vars(module).items())
        found += [(module, name, value) for name, value in named if any(value is each for each in LAUNCHERS)]
    try:
        for owner, name, launcher in found:
            setattr(owner, name, watch(launcher))
        yield
    finally:
        for owner, name, launcher in found:
            setattr(owner, name, launcher)


def _run(case: Case, target: Target, fp8: bool) -> None:
    """Run one latent recursion of the case without gradients, and for training also with backward pass."""
    config = case.config()
    with torch.device("meta"):
        net = TinyRecursiveNetwork.from_config(config).to(getattr(torch, case.parameter_dtype))
        shape = case.batch, case.latents, case.hidden_size
        state = torch.empty(shape, dtype=getattr(torch, case.stream_dtype))
        cos = torch.empty(case.latents, config.head_dim // 2) if config.rotary else None
    parameters = [parameter for block in net.layers for parameter in block_parameters(block)]
    tensors = recursion.AuxiliaryTensors(cos=cos, sin=cos)
    numbers = recursion.Settings(
        layout_name(config),
        case.steps,
        case.heads,
        case.batch,
        case.latents,
        config.norm_eps,
        None,
        0.0,
        getattr(torch, case.dtype),
        "balanced",
    )
    rest: Any = (parameters, [], None, *tensors, *numbers)
    recursion._recursion(state, state, state, *rest)
    if fp8 and case.dtype == "bfloat16" and target.kind == "cuda" and int(target.arch) >= _FIRST_WITH_FP8:
        recursion._recursion(state, state, state, *rest[:-1], True)
    if case.mode != "forward":
        _, _, saved = recursion._recursion_saving(state, state, state, *rest)
        recursion._recursion_backward(state, state, saved, True, True, *rest)
