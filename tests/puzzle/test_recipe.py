"""Tests that a training step equals a plain reimplementation of the official recipe in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

import trm_kernels.training
from llm_trm.models.puzzle import losses
from llm_trm.models.puzzle.losses import puzzle_loss, softmax_cross_entropy, stablemax_cross_entropy, widest
from llm_trm.models.puzzle.paper import PuzzleTRM, PuzzleTRMConfig
from tests.puzzle.plain_recipe import PlainCarry, plain_step, stablemax_loss
from trm_kernels import JointOptimizer, TrainingStep

BATCH, PUZZLES, VOCABULARY, CELLS = 6, 4, 5, 7


class Recorder(SGD):
    """Changes nothing, and stores the gradients."""

    def __init__(self, parameters: list[Tensor]) -> None:
        super().__init__(parameters, lr=0.0)
        self.seen: list[Tensor | None] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.seen = [None if p.grad is None else p.grad.clone() for p in self.param_groups[0]["params"]]


def build(**options: Any) -> PuzzleTRM:
    torch.manual_seed(3)
    sizes: dict[str, Any] = {
        "d_model": 16,
        "n_heads": 2,
        "puzzle_len": 2,
        "puzzle_dim": 20,
        "n_latent_steps": 2,
        "n_deep_recursions": 2,
        "max_steps": 3,
    }
    config = PuzzleTRMConfig(VOCABULARY, CELLS, PUZZLES, **sizes | options)
    model = PuzzleTRM(config, backend="eager").double()
    model.dtype = torch.float64
    with torch.no_grad():
        # Initially all halting logits are -5, and all embeddings are 0.
        model.q_head.weight.normal_()
        model.q_head.bias.zero_()
        if model.config.puzzle_dim:
            model.puzzle_emb.weights.normal_()
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"positions": "learned"},
        {"mixer": "tokens", "positions": "none"},
        {"positions": "none", "puzzle_len": 0, "puzzle_dim": 0},
    ],
    ids=["rope", "learned", "tokens", "plain"],
)
def test_steps_equal_the_plain_recipe(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(**options)
    config = model.config
    parameters = list(model.parameters())
    main = Recorder(parameters)
    optimizer: Any = main
    if config.puzzle_dim:
        model.puzzle_emb.allocate(BATCH)
        assert model.puzzle_emb.rows is not None
        rows = Recorder([model.puzzle_emb.rows])
        optimizer = JointOptimizer([main, rows])
    chance = torch.Generator().manual_seed(1)
    draws = [torch.randint(0, 4, (BATCH,), generator=chance) for _ in range(6)]
    drawn = iter(draws)
    monkeypatch.setattr(trm_kernels.training, "exploration_steps", lambda *_: next(drawn))
    losses: list[float] = []

    def loss(y: Tensor, z: Tensor, inputs: Tensor, labels: Tensor, puzzles: Tensor) -> Any:
        found = puzzle_loss(*model.heads(y), labels)
        losses.append(float(found[0].detach()))
        return found

    step = TrainingStep(
        model.net,
        loss,
        optimizer,
        n=config.n_latent_steps,
        T=config.n_deep_recursions,
        embed=lambda inputs, labels, puzzles: model.embed(inputs, puzzles),
        initial=model.initial,
        max_steps=config.max_steps,
        exploration=0.5,
        modules=[model],
        capture=False,
    )
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    states = {"y_init": model.y_init, "z_init": model.z_init}
    empty = torch.zeros(BATCH, config.length, config.d_model, dtype=torch.float64)
    nothing = {
        "inputs": torch.zeros(BATCH, CELLS, dtype=torch.int64),
        "labels": torch.zeros(BATCH, CELLS, dtype=torch.int64),
        "puzzles": torch.zeros(BATCH, dtype=torch.int64),
    }
    carry = PlainCarry(
        empty, empty, torch.zeros(BATCH, dtype=torch.int64), torch.ones(BATCH, dtype=torch.bool), nothing
    )
    halted = 0
    for number in range(6):
        fresh = {
            "inputs": torch.randint(1, VOCABULARY, (BATCH, CELLS), generator=chance),
            "labels": torch.randint(0, VOCABULARY, (BATCH, CELLS), generator=chance),
            "puzzles": torch.randint(0, PUZZLES, (BATCH,), generator=chance),
        }
        step(*fresh.values())
        now = torch.where(carry.halted, fresh["puzzles"], carry.data["puzzles"])
        front = model.puzzle_emb.weights[now].clone().requires_grad_() if config.puzzle_dim else None
        expected, carry = plain_step(weights | states, front, config, carry, fresh, draws[number])
        gradients = torch.autograd.grad(expected, [*weights.values(), *([] if front is None else [front])])
        seen = [*main.seen, *(rows.seen if config.puzzle_dim else [])]
        assert losses[-1] == pytest.approx(float(expected.detach()), rel=1e-9)
        for name, own, other in zip([*weights, "rows"], seen, gradients, strict=False):
            assert own is not None, name
            assert other.abs().max() > 0, name
            torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-9 * float(other.abs().max()), msg=name)
        assert step.carry.y is not None and step.carry.z is not None
        torch.testing.assert_close(step.carry.y, carry.z_H, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(step.carry.z, carry.z_L, rtol=1e-9, atol=1e-9)
        assert step.carry.steps.tolist() == carry.steps.tolist()
        assert step.carry.halted.tolist() == carry.halted.tolist()
        for own, other in zip(step.carry.data, carry.data.values(), strict=True):
            assert own is not None and torch.equal(own, other)
        halted += int(carry.halted.sum())
    assert 0 < halted < 6 * BATCH  # some went on, some made room


def test_stablemax_and_its_gradient() -> None:
    torch.manual_seed(0)
    logits = (4 * torch.randn(3, 9, 6, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(0, 6, (3, 9))
    own, other = stablemax_cross_entropy(logits, labels), stablemax_loss(logits, labels)
    torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)
    for value in (own, other):
        assert (value == 0).sum() >= (labels == 0).sum() > 0
    mine, theirs = (torch.autograd.grad(value.sum(), logits)[0] for value in (own, other))
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_stablemax_gradient_is_finite_at_poles() -> None:
    logits = torch.tensor([[[1.0, -1.0, 0.0, 1e30]]]).requires_grad_()
    stablemax_cross_entropy(logits, torch.tensor([[2]])).sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_stablemax_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [widest(torch.device(kind)) for kind in ("cpu", "cuda")] == [torch.float64] * 2
    assert widest(torch.device("mps")) == torch.float32
    logits, labels = torch.randn(3, 9, 6), torch.randint(0, 6, (3, 9))
    wide = stablemax_cross_entropy(logits, labels)
    monkeypatch.setattr(losses, "widest", lambda _: torch.float32)
    narrow = stablemax_cross_entropy(logits, labels)
    assert (wide.dtype, narrow.dtype) == (torch.float64, torch.float32)
    torch.testing.assert_close(narrow.double(), wide, rtol=1e-5, atol=1e-6)


def test_softmax_ignores_padding() -> None:
    logits = torch.randn(2, 3, 4)
    labels = torch.tensor([[1, 0, 3], [0, 0, 2]], dtype=torch.uint8)
    found = softmax_cross_entropy(logits, labels)
    expected = -logits.log_softmax(-1).gather(-1, labels.long()[..., None]).squeeze(-1)
    torch.testing.assert_close(found, expected * (labels != 0))


def test_metrics_of_a_known_answer() -> None:
    labels = torch.tensor([[1, 2, 0], [2, 2, 1]])
    logits = torch.zeros(2, 3, 3)
    logits[0, 0, 1] = logits[0, 1, 2] = logits[0, 2, 1] = 9.0  # right wherever it counts
    logits[1, :, 2] = 9.0  # the last cell is wrong
    _, metrics, halts = puzzle_loss(logits, torch.tensor([1.0, 1.0]), labels)
    assert metrics["exact"] == 0.5
    assert metrics["cells"] == pytest.approx((1 + 2 / 3) / 2)
    assert metrics["halt_right"] == 0.5
    assert halts.tolist() == [True, True]
