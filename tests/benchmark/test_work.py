"""Tests of the counts of operations, bytes and memory, and of the suites."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llm_trm.benchmark.candidates import build
from llm_trm.benchmark.limits import Limits
from llm_trm.benchmark.memory import peak_memory
from llm_trm.benchmark.steps import make_inputs, make_state
from llm_trm.benchmark.suites import SUITES, group_of, left_out, scaling_axes, shrunk, suite
from llm_trm.benchmark.workloads import Case

CPU = torch.device("cpu")
SMALL = Case("train", 32, 12, batch=3, heads=4)


@pytest.mark.parametrize("family", ["seed", "paper", "scratch"])
@pytest.mark.parametrize("mode", ["forward", "train", "step"])
def test_flops_are_those_that_pytorch_counts(mode: Any, family: str) -> None:
    case = replace(SMALL, mode=mode, family=family)
    step = build("eager", case, make_state(case, CPU), make_inputs(case, CPU, 0))
    assert not isinstance(step, str), step
    step.prepare()
    # The counter does not know the fused attention of CPUs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step(0)
    # Nothing before the paper's first projection needs a gradient, so autograd skips that product.
    left_out = 6 * 3 * 12 * 32 * 32 if (mode, family) == ("step", "paper") else 0
    assert case.flops == counter.get_total_flops() + left_out


def test_bytes_count_parameters_once_or_in_every_call() -> None:
    case = Case("forward", 64, 16, dtype="bfloat16")
    states = 5 * 16 * 64 * 2
    weights = 2 * case.parameters
    assert case.bytes_moved(cache_bytes=weights) == states + weights
    assert case.bytes_moved(cache_bytes=weights - 1) == states + 7 * weights
    training = replace(case, mode="train")
    assert training.bytes_moved(cache_bytes=0) == 7 * 16 * 64 * 2 + (21 + 7 + 1) * weights
    step = replace(case, mode="step")  # streams, parameters, average and moments in float32
    assert step.bytes_moved(cache_bytes=0) == 5 * 16 * 64 * 4 + (21 + 7 + 7) * 2 * weights


def test_floor_is_the_longer_of_arithmetic_and_traffic() -> None:
    case = Case("forward", 64, 16)
    assert Limits(1e9, 1e30, 0).floor(case) == pytest.approx(case.flops / 1e9)
    assert Limits(1e30, 1e9, 0).floor(case) == pytest.approx(case.bytes_moved(0) / 1e9)


def test_peak_memory_counts_simultaneous_allocations() -> None:
    def call() -> torch.Tensor:
        a = torch.empty(1000, dtype=torch.float32)
        del a
        b = torch.empty(3000, dtype=torch.float32)
        c = torch.empty(2000, dtype=torch.float32)
        del b
        return c

    assert peak_memory(CPU, call) == pytest.approx(5000 * 4, abs=256)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", SUITES)
def test_suites_hold_valid_distinct_cases(name: str, device: str) -> None:
    cases = suite(name, device, "float32")
    assert len({case.name for case in cases}) == len(cases) > 0
    for case in cases:
        assert case.config().d_model == case.hidden_size
        assert case.flops > 0
        assert case.bytes_moved(0) > case.bytes_moved(2**40) > 0


def test_suite_has_default_modes_unless_requested() -> None:
    assert {case.mode for case in suite("train", "cuda", "float32")} == {"step"}
    assert {case.mode for case in suite("peers", "cuda", "float32")} == {"forward", "train", "step"}
    assert {case.mode for case in suite("paper", "cuda", "float32")} == {"forward", "train"}
    assert {case.mode for case in suite("paper", "cuda", "float32", ("step",))} == {"step"}
    assert not suite("train", "cuda", "float32", ("forward",))
    assert not suite("scaling", "cuda", "float32", ("train",))
    assert not suite("train", "cuda", "float16")


def test_train_suite_has_the_target_shapes() -> None:
    cases = suite("train", "cuda", "bfloat16")
    assert [(case.family, case.hidden_size, case.latents, case.batch) for case in cases] == [
        ("seed", 256, 256, 8),
        ("seed", 256, 256, 32),
        ("paper", 512, 97, 768),
    ]


def test_scaling_varies_one_axis_at_a_time() -> None:
    cases = suite("scaling", "cuda", "bfloat16")
    axes = {axis.field: axis for axis in scaling_axes(cpu=False)}
    found = {name: sorted(filter(None, map(axis.value, cases))) for name, axis in axes.items()}
    assert found["batch"] == [1, 4, 16, 64, 256, 1024]
    assert found["latents"] == [32, 64, 256, 1024, 4096]
    assert found["hidden_size"] == [256, 512, 1024, 2048]
    assert axes["batch"].value(replace(cases[0], layers=3)) is None


def test_scaling_on_a_cpu_lists_omitted_points() -> None:
    note = left_out("scaling", "cpu")
    assert note is not None
    assert "batch size 256, batch size 1024" in note
    assert max(case.batch for case in suite("scaling", "cpu", "float32")) == 64
    assert left_out("scaling", "cuda") is None
    assert left_out("phase2", "cpu") is None


def test_quick_shrinks_every_case_and_keeps_its_kind() -> None:
    for name in SUITES:
        cases = suite(name, "cuda", "float32")
        small = shrunk(cases)
        assert {(case.mode, case.family) for case in small} == {(case.mode, case.family) for case in cases}
        assert all(case.flops < 2e9 for case in small)
        assert all(case.config().n_heads == 4 for case in small)


def test_groups_of_suites() -> None:
    assert group_of("paper") == "peers"
    assert [group_of(name) for name in ("peers", "scaling", "train", None)] == [
        "peers",
        "scaling",
        "main",
        "main",
    ]
