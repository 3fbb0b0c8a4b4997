"""Tests that the reimplemented original trainer has the function, gradients and training of ours."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from bench.plain_trainer import PlainAverage, PlainSequenceTRM, PlainTrainer
from llm_trm.models.sequence_trm import SequenceTRM, SequenceTRMConfig
from trm_kernels import ParameterAverage

CONFIG = SequenceTRMConfig(d_compressed=16, n_layers=2, n_heads=2, n_latent_steps=2, n_deep_recursions=2)
LENGTHS = (5, 2, 4)


def models() -> tuple[SequenceTRM, PlainSequenceTRM]:
    ours = SequenceTRM.from_config(CONFIG, backend="eager")
    for parameter in ours.parameters():  # initial norms and biases would hide errors
        torch.nn.init.normal_(parameter, std=0.3)
    plain = PlainSequenceTRM(CONFIG)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def test_outputs_and_gradients_equal_the_drop_in() -> None:
    ours, plain = models()
    x = torch.randn(3, 5, 16)
    mask = (torch.arange(5) < torch.tensor(LENGTHS)[:, None]).float()
    x = x * mask[..., None]
    embedded, y, z, extended = ours.setup_for_steps(x, mask)
    assert extended is not None
    torch.testing.assert_close(plain.embed(x), embedded)
    y, z = torch.randn_like(y), torch.randn_like(z)
    expected = ours.single_step(embedded, y, z, extended)
    found = plain(plain.embed(x), y, z, extended)
    valid = extended.bool()
    for own, other in zip(expected[:2], found[:2], strict=True):
        torch.testing.assert_close(own[valid], other[valid], atol=1e-5, rtol=0)
    torch.testing.assert_close(expected[2], found[2], atol=1e-5, rtol=0)
    for outputs in (expected, found):
        (outputs[0][:, -1].square().sum() + outputs[2].sum()).backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-4, rtol=1e-4, msg=name)


def test_average_is_the_recurrence() -> None:
    _, plain = models()
    average = PlainAverage(plain, 0.75)
    own = ParameterAverage(plain.parameters(), 0.75)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(2.0)
    average.update()
    own.update()
    torch.testing.assert_close(list(average.shadow.values()), own.averages)


def test_a_batch_is_trained_on_as_by_hand() -> None:
    _, plain = models()
    by_hand = copy.deepcopy(plain)
    contexts = [torch.randn(length, 16) for length in LENGTHS]
    targets = list(torch.randn(3, 16))
    measured = PlainTrainer(plain, supervision_steps=2, learning_rate=1e-2).train_batch(contexts, targets)

    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95))
    x, mask = torch.zeros(3, 5, 16), torch.zeros(3, 6)
    for row, context in enumerate(contexts):
        x[row, : len(context)] = context
        mask[row, : len(context)] = 1
    mask[:, 5] = 1
    y = z = torch.zeros(3, 6, 16)
    losses = []
    for _ in range(2):
        y, z, halt = by_hand(by_hand.embed(x), y.detach(), z.detach(), mask)
        target = torch.stack(targets)
        cosine = F.cosine_similarity(y[:, -1], target, dim=-1).detach()
        loss = (y[:, -1] - target).square().mean() + 0.5 * (halt[:, 0] - cosine).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert [step["loss"] for step in measured] == pytest.approx(losses, rel=1e-5)
    for own, other in zip(plain.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(own, other)


def test_non_finite_loss_changes_nothing() -> None:
    _, plain = models()
    before = copy.deepcopy(plain.state_dict())
    trainer = PlainTrainer(plain, supervision_steps=1)
    measured = trainer.train_batch([torch.full((2, 16), float("inf"))], [torch.zeros(16)])
    assert measured[0]["loss"] != measured[0]["loss"]
    torch.testing.assert_close(plain.state_dict(), before, rtol=0, atol=0)
