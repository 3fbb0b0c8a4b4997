"""Tests that all implementations of a training step compute the same step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from llm_trm.benchmark import accuracy, training
from llm_trm.benchmark.library_step import LibraryStep
from llm_trm.benchmark.models import ours
from llm_trm.benchmark.steps import Inputs, make_inputs, make_state
from llm_trm.benchmark.training import DeviceLoopStep, LoopStep
from llm_trm.benchmark.workloads import Case
from trm_kernels.graphs import cache as cache_internals
from trm_kernels.testing import UNIT_ROUNDOFF

CPU = torch.device("cpu")
CASE = Case("step", 32, 8, batch=3, heads=4)
KINDS = {
    "loop": LoopStep,
    "device loop": DeviceLoopStep,
    "library": lambda *arguments: LibraryStep(*arguments, capture=False),
}


@pytest.fixture
def inputs() -> Inputs:
    return make_inputs(CASE, CPU, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["seed", "paper"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_step_has_the_gradients_of_float64(kind: str, family: str, dtype: str) -> None:
    case = replace(CASE, family=family, dtype=dtype)
    state, inputs = make_state(case, CPU), make_inputs(case, CPU, 0)
    truth = accuracy.float64_truth(case, state, inputs)
    step = KINDS[kind](case, ours("eager")(case, state), inputs)
    step.prepare()
    step(1)
    step.check()
    results = dict(step.results())
    assert results.keys() == truth.keys()
    assert all(tensor.dtype == torch.float32 for name, tensor in results.items() if name != "output")
    bound = 20 * UNIT_ROUNDOFF[getattr(torch, dtype)]
    for name, pool in accuracy.errors(results.items(), truth).items():
        assert pool.error < bound, name


def test_three_implementations_update_parameters_equally(inputs: Inputs) -> None:
    state = make_state(CASE, CPU)
    after: dict[str, list[torch.Tensor]] = {}
    for kind, make in KINDS.items():
        step: Any = make(CASE, ours("eager")(CASE, state), inputs)
        for _ in range(3):
            step(0)
        averages = step.average.averages if kind == "library" else list(step.average.values())
        after[kind] = [tensor.detach() for tensor in (*step.parameters.values(), *averages)]
    before = [*state.values(), inputs.head]
    assert all(not torch.equal(now, then) for now, then in zip(after["loop"], before, strict=False))
    for kind in ("device loop", "library"):
        for ours_, loop in zip(after[kind], after["loop"], strict=True):
            # AdamW's first updates have the sign of the gradient, so they differ where it is only rounding.
            assert (ours_ - loop).norm() < 1e-3 * loop.norm()


def test_float64_truth_of_a_step_in_chunks_equals_the_whole(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = make_state(CASE, CPU)
    whole = accuracy.float64_truth(CASE, state, inputs)
    monkeypatch.setattr(accuracy, "_CHUNK_ELEMENTS", 1)
    for name, tensor in accuracy.float64_truth(CASE, state, inputs).items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-12, atol=1e-12)


def test_step_without_autocasts_cache_has_every_gradient(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "autocast_cache_keeps_gradients", lambda device_type: False)
    case = replace(CASE, dtype="bfloat16")
    state = make_state(case, CPU)
    truth = accuracy.float64_truth(case, state, inputs)
    step = LoopStep(case, ours("eager")(case, state), inputs)
    step.prepare()
    step.check()
    pools = accuracy.errors(step.results(), truth)
    assert all(pool.error < 20 * UNIT_ROUNDOFF[torch.bfloat16] for pool in pools.values())


def test_clipping_binds(inputs: Inputs) -> None:
    truth = accuracy.float64_truth(CASE, make_state(CASE, CPU), inputs)
    del truth["output"]
    total = torch.stack([gradient.norm() for gradient in truth.values()]).norm()
    assert total == pytest.approx(1.0, rel=1e-5)


def test_step_that_does_not_change_a_parameter_is_rejected(inputs: Inputs) -> None:
    step = LoopStep(CASE, ours("eager")(CASE, make_state(CASE, CPU)), inputs)
    step.prepare()
    step.optimizer.param_groups[0]["lr"] = 0.0
    with pytest.raises(RuntimeError, match="did not change the parameter"):
        step.check()


def test_uncaptured_library_step_gives_no_result(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_internals, "_WARNED", set())  # one warning per reason and process
    step = LibraryStep(CASE, ours("eager")(CASE, make_state(CASE, CPU)), inputs, capture=True)
    with pytest.warns(RuntimeWarning), pytest.raises(RuntimeError, match="not captured"):
        step.prepare()


@pytest.mark.interpreter
def test_library_step_on_the_kernels_obeys_the_rule(device: str) -> None:
    case = replace(CASE, batch=2, layers=1, steps=1, recursions=2)
    where = torch.device(device)
    state, inputs = make_state(case, where), make_inputs(case, where, 0)
    truth = accuracy.float64_truth(case, state, inputs)
    pools = []
    for build in (ours("triton"), ours("eager")):
        step = LibraryStep(case, build(case, state), inputs, capture=False)
        step.prepare()
        step.check()
        pools.append(accuracy.errors(step.results(), truth))
    assert not accuracy.broken_rules(torch.float32, *pools)
