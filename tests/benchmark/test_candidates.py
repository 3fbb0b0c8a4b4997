"""Tests that candidates compute the right function, and give the reason if they cannot run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import trm_kernels
from llm_trm.benchmark import accuracy, runner
from llm_trm.benchmark.candidates import CANDIDATES, build, candidates_for, unavailable
from llm_trm.benchmark.models import ours
from llm_trm.benchmark.results import Row
from llm_trm.benchmark.runner import Budget, CaseRun, run_case
from llm_trm.benchmark.steps import Step, make_inputs, make_state
from llm_trm.benchmark.workloads import Case
from trm_kernels import backends
from trm_kernels.testing import UNIT_ROUNDOFF, ErrorPool

CPU = torch.device("cpu")
SMALL = Case("train", 32, 12, batch=3, heads=4)


def test_original_and_eager_compute_the_reference_and_its_gradients() -> None:
    state = make_state(SMALL, CPU)
    inputs = make_inputs(SMALL, CPU, 0)
    truth = accuracy.float64_truth(SMALL, state, inputs)
    for name in ("original", "eager"):
        step = build(name, SMALL, state, inputs)
        assert isinstance(step, Step), step
        step(0)
        found = dict(step.results())
        assert found.keys() == truth.keys()
        assert all(pool.error < 1e-5 for pool in accuracy.errors(found.items(), truth).values())


def test_float64_truth_in_chunks_equals_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    state = make_state(SMALL, CPU)
    inputs = make_inputs(SMALL, CPU, 0)
    whole = accuracy.float64_truth(SMALL, state, inputs)
    monkeypatch.setattr(accuracy, "_CHUNK_ELEMENTS", 1)
    for name, tensor in accuracy.float64_truth(SMALL, state, inputs).items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-12, atol=1e-12)


def test_wrong_gradient_of_one_bias_breaks_the_rule() -> None:
    state = make_state(SMALL, CPU)
    inputs = make_inputs(SMALL, CPU, 0)
    truth = accuracy.float64_truth(SMALL, state, inputs)
    eager = build("eager", SMALL, state, inputs)
    assert isinstance(eager, Step)
    eager(0)
    found = dict(eager.results())
    right = accuracy.errors(found.items(), truth)
    assert not accuracy.broken_rules(torch.float32, right, right)
    found["layers.1.mlp.2.bias"] = found["layers.1.mlp.2.bias"] * 0
    wrong = accuracy.errors(found.items(), truth)
    assert len(accuracy.broken_rules(torch.float32, wrong, right)) == 1


def test_nan_breaks_the_rule_and_is_recorded_as_null() -> None:
    pool = ErrorPool(float("nan"), 1.0)
    assert accuracy.broken_rules(torch.float32, {"output": pool}, {"output": ErrorPool(0.0, 1.0)})
    assert UNIT_ROUNDOFF[torch.float32] > 0


def test_interpreter_is_not_timed() -> None:
    reason = unavailable("triton", "cpu")
    assert reason is not None
    assert "GPU" in reason


def test_candidate_known_to_break_the_device_is_not_built() -> None:
    case = Case("forward", 32, 8, heads=4)
    result = run_case(case, CPU, ("eager", "compile"), Budget(60, 0.05), excluded={"compile": "it hung"})
    assert [row.status for row in result.rows] == ["ok", "failed"]
    assert result.rows[1].reason == "it hung"


def test_library_recursions_get_the_options_of_a_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def recursion(net: Any, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor, **options: Any) -> Any:
        seen.append(options)
        return y, z

    monkeypatch.setattr(trm_kernels, "latent_recursion", recursion)
    model = ours("eager", memory="small")(SMALL, make_state(SMALL, CPU))
    model.latent(*make_inputs(SMALL, CPU, 0)[0])
    assert seen == [{"n": 6, "memory": "small"}]


def test_tables_have_matching_candidates() -> None:
    seed, paper = Case("forward", 32, 8), Case("forward", 32, 8, family="paper")
    assert candidates_for(seed, "cpu") == ("original", "eager", "compile", "triton", "native")
    assert "original" not in candidates_for(paper, "cuda")
    assert "official" in candidates_for(paper, "cuda", "peers")
    assert "official" not in candidates_for(seed, "cuda", "peers")
    assert "triton-small+graph" not in candidates_for(seed, "cuda")
    assert "triton-small+graph" in candidates_for(SMALL, "cuda")
    assert candidates_for(seed, "cuda", "scaling")[-1] == "triton+graph"
    assert "triton-fp8+graph" not in candidates_for(seed, "cuda")
    assert "triton-fp8+graph" in candidates_for(replace(seed, dtype="bfloat16"), "cuda")


def test_fused_recursion_that_rejects_a_case_is_not_a_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    recursion = backends.FusedRecursion(lambda *_: "wrong phase of the moon", lambda *_, **__: None)  # type: ignore[arg-type, return-value]
    monkeypatch.setitem(backends.BACKENDS, "eager", replace(backends.BACKENDS["eager"], recursion=recursion))
    built = build("eager", SMALL, make_state(SMALL, CPU), make_inputs(SMALL, CPU, 0))
    assert built == "wrong phase of the moon"


@pytest.mark.parametrize("name", CANDIDATES)
def test_candidate_gives_reason_if_it_cannot_run_on_a_cpu(name: str) -> None:
    reason = unavailable(name, "cpu")
    if name.endswith("+graph") or name in ("compile-max", "official+compile-all", "liger"):
        assert reason is not None
        assert "CUDA device, not cpu" in reason


def test_coarser_candidate_is_timed_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounded(net: Any, x: torch.Tensor, mask: None) -> torch.Tensor:
        return net.forward_eager(x, mask) * 1.01

    monkeypatch.setitem(
        backends.BACKENDS,
        "native",
        backends.Backend("native", "", lambda: None, lambda *_: None, rounded),
    )
    monkeypatch.setitem(CANDIDATES, "native", replace(CANDIDATES["native"], coarser="three digits"))
    case = Case("forward", 32, 8, heads=4)
    row = run_case(case, CPU, ("native",), Budget(60, 0.05)).rows[0]
    assert (row.status, row.coarser) == ("ok", "three digits")
    assert row.median_ms is not None
    assert (row.errors["output"] or 0.0) > 1e-3


def test_graph_that_would_leave_no_memory_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    run = CaseRun(SMALL, CPU, Budget(60, 0.05), lambda _: None, 0, {}, "main")
    run.rows = {
        "eager": Row("eager", "ok", peak_bytes=30 << 30),
        "triton": Row("triton", "ok", peak_bytes=8 << 30),
    }
    monkeypatch.setattr(runner, "free_memory", lambda device: 48 << 30)
    assert run._lacks_memory(CANDIDATES["eager"]) is None
    assert run._lacks_memory(CANDIDATES["triton+graph"]) is None
    assert run._lacks_memory(CANDIDATES["triton-small+graph"]) is None
    reason = run._lacks_memory(CANDIDATES["eager+graph"])
    assert reason is not None
    assert "about 30 GiB" in reason
    assert "48 GiB are free" in reason


def test_own_graphs_are_prepared_before_baseline_graphs() -> None:
    names = sorted(candidates_for(SMALL, "cuda", "peers"), key=runner._preparation_order)
    assert names.index("triton+graph") < names.index("eager+graph") < names.index("compile")
    assert names[-1].startswith("compile-max")


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["seed", "paper"])
@pytest.mark.parametrize("mode", ["forward", "train", "step"])
def test_kernels_and_graph_replays_give_the_right_result(mode: Any, family: str) -> None:
    case = Case(
        mode, 64, 32, batch=2, heads=4, family=family, dtype="bfloat16" if mode == "step" else "float32"
    )
    modern = torch.cuda.get_device_capability() >= (9, 0)
    names = [
        name for name in candidates_for(case, "cuda") if name != "native" and (modern or "fp8" not in name)
    ]
    result = run_case(case, torch.device("cuda"), names, Budget(300, 0.2))
    for row in result.rows:
        assert row.status == "ok", f"{row.backend}: {row.reason}"
        assert row.median_ms is not None
        assert row.peak_bytes is not None
        assert row.peak_bytes > 0
