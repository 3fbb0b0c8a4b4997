"""The loss of a supervision step, and the learning rate, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from llm_trm.models.contexts import errors
from llm_trm.train.phase2.losses import SupervisionLoss, means_of
from llm_trm.train.run.schedule import warmup_cosine

TARGET = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
STATE = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
LOGITS = torch.tensor([0.4, -1.0])


def loss_of(loss: SupervisionLoss, state: Tensor = STATE) -> tuple[float, dict[str, float]]:
    y = torch.stack((torch.full_like(state, 9.0), state), dim=1)  # only the last position counts
    value, metrics = loss(y, y, y, torch.ones(2, 1), TARGET)
    return float(value), {name: float(metric) for name, metric in metrics.items()}


def logits(y: Tensor) -> Tensor:
    return LOGITS


def test_errors_of_each_sample() -> None:
    found = errors(STATE, TARGET)
    assert found["mse"].tolist() == [0.0, 2.5]
    assert found["cosine"].tolist() == pytest.approx([1.0, 0.0])
    assert found["relative_error"].tolist() == pytest.approx([0.0, math.sqrt(5)])


def test_mse_halting_loss() -> None:
    value, metrics = loss_of(SupervisionLoss(logits, 2, halt="mse", weight=0.5))
    first, second = (torch.sigmoid(LOGITS) - torch.tensor([1.0, 0.0])).square().tolist()
    assert metrics["halt_loss"] == pytest.approx((first + second) / 2)
    assert value == pytest.approx(2.5 / 2 + 0.5 * (first + second) / 2)
    assert metrics["cosine"] == pytest.approx(0.5)
    assert metrics["active"] == 1.0


def test_bce_halting_loss_follows_its_threshold() -> None:
    loss = SupervisionLoss(logits, 2, halt="bce", weight=1.0, threshold=0.7)
    probability = torch.sigmoid(LOGITS).tolist()
    expected = -(math.log(probability[0]) + math.log(1 - probability[1])) / 2
    assert loss_of(loss)[1]["halt_loss"] == pytest.approx(expected)
    loss.threshold.fill_(-0.5)  # now both are good enough
    assert loss_of(loss)[1]["halt_loss"] == pytest.approx(-sum(map(math.log, probability)) / 2)


def test_cosine_is_a_target_without_gradient() -> None:
    state = STATE.clone().requires_grad_()
    y = state[:, None]
    value, _ = SupervisionLoss(logits, 2, halt="mse", weight=100.0)(y, y, y, torch.ones(2, 1), TARGET)
    value.backward()
    torch.testing.assert_close(state.grad, (STATE - TARGET) / 2)


@pytest.mark.parametrize(("leaves", "left"), [("none", [0, 0]), ("sample", [1, 0]), ("batch", [0, 0])])
def test_who_leaves(leaves: str, left: list[int]) -> None:
    loss = SupervisionLoss(logits, 2, leaves=leaves)  # type: ignore[arg-type]
    loss_of(loss)
    assert loss.left.tolist() == left


def test_batch_leaves_by_its_mean() -> None:
    loss = SupervisionLoss(lambda y: torch.tensor([3.0, -0.5]), 2, leaves="batch")
    loss_of(loss)
    assert loss.left.all()


def test_samples_that_left_count_for_nothing() -> None:
    loss = SupervisionLoss(logits, 2, weight=0.0, leaves="sample")
    loss_of(loss)
    value, metrics = loss_of(loss, STATE + 1.0)
    assert value == pytest.approx((0.0 + 9.0) / 2 / 2)  # sample 1 alone, over both
    assert metrics["active"] == 0.5
    assert means_of({**metrics, "loss": value}, 1)["mse"] == pytest.approx(4.5)
    loss.restart()
    assert not loss.left.any()


def test_warm_up_and_cosine() -> None:
    shares = [warmup_cosine(step, 12, 4) for step in range(12)]
    assert shares[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert shares[8] == pytest.approx(0.5)
    assert shares[11] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    assert warmup_cosine(12, 12, 4) == 0.0
    assert warmup_cosine(0, 12, 0) == 1.0
