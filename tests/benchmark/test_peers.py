"""Tests of other implementations: they compute the same function, or report what they compute."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_trm.benchmark import accuracy, official, peers
from llm_trm.benchmark.candidates import unavailable
from llm_trm.benchmark.models import original_network, reference_network, written_out
from llm_trm.benchmark.runner import Budget, run_case
from llm_trm.benchmark.steps import Step, make_inputs, make_state
from llm_trm.benchmark.workloads import Case
from tests.foreign import official as as_published
from trm_kernels import reference

CPU = torch.device("cpu")
PAPER = Case("train", 32, 9, batch=2, heads=4, family="paper")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_official_model_computes_the_papers_recursion(dtype: str) -> None:
    case = replace(PAPER, dtype=dtype)
    state, inputs = make_state(case, CPU), make_inputs(case, CPU, 0)
    truth = accuracy.float64_truth(case, state, inputs)
    errors = []
    for build in (official.model(), written_out(reference_network)):
        step = Step(case, build(case, state), inputs)
        step.prepare()
        assert dict(step.results()).keys() == truth.keys()
        errors.append(accuracy.errors(step.results(), truth))
    theirs, eager = errors
    assert not accuracy.broken_rules(getattr(torch, dtype), theirs, eager)


def test_official_model_matches_the_patched_model() -> None:
    config = as_published.Config(hidden_size=32, num_heads=4, seq_len=9, puzzle_emb_len=0)
    level = as_published.ReasoningModule([as_published.Block(config) for _ in range(2)])
    rotary = as_published.RotaryEmbedding(8, 9, config.rope_theta)
    inputs = make_inputs(PAPER, CPU, 0)
    model = official.model()(PAPER, level.state_dict())
    with torch.no_grad():
        y, z = model.latent(*inputs[0])
        x, their_y, their_z = inputs[0]
        for _ in range(PAPER.steps):
            their_z = level(their_z, their_y + x, cos_sin=rotary())
        their_y = level(their_y, their_z, cos_sin=rotary())
    torch.testing.assert_close(z, their_z)
    torch.testing.assert_close(y, their_y)


class _Product:
    """Replaces liger-kernel's functions, which need a GPU."""

    calls: list[str]

    @staticmethod
    def apply(gate: Tensor, up: Tensor) -> Tensor:
        _Product.calls.append("silu")
        return F.silu(gate) * up


class _Norm:
    @staticmethod
    def apply(x: Tensor, weight: Tensor | None, eps: float, *options: Any) -> Tensor:
        assert options == (0.0, "gemma", False)
        _Product.calls.append("norm")
        return F.rms_norm(x, x.shape[-1:], weight, eps)


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    package, ops = ModuleType("liger_kernel"), ModuleType("liger_kernel.ops")
    ops.LigerSiLUMulFunction, ops.LigerRMSNormFunction = _Product, _Norm  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", ops)
    _Product.calls = []
    return _Product.calls


@pytest.mark.parametrize(
    ("family", "calls"), [("seed", ["norm"] * 2), ("scratch", ["norm", "norm", "silu"]), ("paper", None)]
)
def test_liger_kernels_replace_modules_of_the_family(
    family: str, calls: list[str] | None, liger: list[str]
) -> None:
    case = Case("forward", 32, 9, layers=1, heads=4, family=family)
    state, x = make_state(case, CPU), torch.randn(2, 9, 32)
    eager = reference.TinyRecursiveNetwork(case.config())
    eager.load_state_dict(state)
    model = peers.liger_model()(case, state)
    torch.testing.assert_close(model.net(x), eager(x))
    assert liger == (calls or ["norm", "silu", "norm"])


def test_missing_package_is_named_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    for name in ("tiny-recursive-model", "tiny-recursive-model+compile"):
        reason = unavailable(name, "cpu")
        assert reason == 'tiny-recursive-model is not installed: pip install "llm-trm[peers]"'
    assert "liger-kernel is not installed" in (unavailable("liger", "cuda") or "")


def test_operations_of_another_function_are_counted() -> None:
    case = Case("forward", 32, 9, batch=2, heads=4)
    with torch.device("meta"):
        counted = peers.count_flops(original_network(case).train(), torch.empty(2, 9, 32))
    assert case.in_all_calls(counted) == case.flops


class _Mixer(nn.Module):
    def __init__(self, *, dim: int, depth: int, seq_len: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(seq_len, dim), nn.Linear(dim, seq_len)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(F.gelu(self.first(x.transpose(1, 2)))).transpose(1, 2)


class _Model(nn.Module):
    """Replaces the package's model, which may not be installed, with the same methods."""

    def __init__(
        self, *, dim: int, num_tokens: int, network: nn.Module, num_refinement_blocks: int, **options: int
    ) -> None:
        super().__init__()
        self.network, self.T, self.n = network, num_refinement_blocks, options["num_latent_refinements"]

    def refine_latent_then_output_once(self, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(self.n):
            z = self.network(x + y + z)
        return self.network(y + z), z

    def deep_refinement(self, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return reference.deep_recursion(self.network, x, y, z, self.n, self.T)


@pytest.fixture
def mixer_package(monkeypatch: pytest.MonkeyPatch) -> None:
    if peers.missing("tiny_recursive_model") is None:
        return
    package = ModuleType("tiny_recursive_model")
    package.MLPMixer1D, package.TinyRecursiveModel = _Mixer, _Model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tiny_recursive_model", package)
    monkeypatch.setattr(peers, "missing", lambda name: None)


@pytest.mark.parametrize("mode", ["forward", "train", "step"])
def test_package_of_another_function_is_timed_and_labelled(mode: Any, mixer_package: None) -> None:
    case = Case(mode, 32, 8, batch=2, heads=4)
    (row,) = run_case(case, CPU, ("tiny-recursive-model",), Budget(60, 0.05), group="peers").rows
    assert (row.status, row.reason) == ("ok", None)
    assert row.differs == peers.MIXER_DIFFERS
    assert row.errors == {}
    assert row.share is None
    assert row.flops is not None
    assert row.flops > 0
    assert row.median_ms is not None
    assert row.tflops == pytest.approx(row.flops / row.median_ms * 1e-9)
