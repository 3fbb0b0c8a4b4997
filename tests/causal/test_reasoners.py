"""Tests of reasoners, their recursion, and the layout of a batch."""

from __future__ import annotations

import pytest
import torch

from llm_trm.errors import InputError
from llm_trm.models.causal import HiddenStateTRM, TRMForCausalLM
from llm_trm.models.causal.layout import lay_out
from llm_trm.models.causal.recurring import recur
from llm_trm.models.sequence_trm import SequenceTRM
from tests.causal.tiny import REASONERS, tiny_decoder, tiny_trm


@pytest.mark.parametrize("reasoner", REASONERS)
@pytest.mark.parametrize("soft_tokens", [1, 4])
def test_any_mask_even_an_empty_one(reasoner: str, soft_tokens: int) -> None:
    model = tiny_trm(reasoner=reasoner, soft_tokens=soft_tokens, num_latents=soft_tokens).model.reasoner
    states = torch.randn(3, 6, 32)
    mask = torch.tensor([[0, 1, 0, 1, 1, 0], [0] * 6, [1] * 6], dtype=torch.bool)
    states[~mask] = torch.nan
    thought = model(states, mask)
    assert thought.soft_tokens.shape == (3, soft_tokens, 32) and thought.soft_tokens.isfinite().all()
    alone = model(states[:1, [1, 3, 4]], torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(thought.soft_tokens[:1], alone.soft_tokens, rtol=1e-4, atol=1e-5)
    if soft_tokens > 1:
        assert (thought.soft_tokens[:, 0] - thought.soft_tokens[:, 1]).abs().max() > 1e-3


@pytest.mark.parametrize("halting", ["sample", "batch", "none"])
def test_the_same_with_a_gradient_as_without(halting: str) -> None:
    torch.manual_seed(0)
    model = SequenceTRM(16, 1, 4, 2, 2)
    torch.nn.init.normal_(model.halt_head.weight)
    x = torch.randn(8, 5, 16)
    with torch.no_grad():
        logits = model.halt_logits(model.deep_recursion(x, torch.zeros_like(x), torch.zeros_like(x))[0])
        model.halt_head.bias.sub_(logits.sort().values[3:5].mean())
        plain = recur(model, x, max_steps=4, halting=halting)
    trained = recur(model, x, max_steps=4, halting=halting)
    torch.testing.assert_close(trained.y, plain.y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(trained.halt_logits, plain.halt_logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(trained.steps, plain.steps)
    assert (len(set(plain.steps.tolist())) > 1) == (halting == "sample")
    trained.y.sum().backward()
    assert model.net.layers[0].mlp[0].weight.grad.abs().max() > 0 and model.halt_head.weight.grad is None
    trained.halt_logits.sum().backward()
    assert model.halt_head.weight.grad.abs().max() > 0


def test_the_last_step_alone_has_a_gradient() -> None:
    torch.manual_seed(0)
    model = SequenceTRM(16, 1, 4, 2, 2)
    x = torch.randn(2, 5, 16, requires_grad=True)
    recurred = recur(model, x, max_steps=3, halting="none")
    y = z = torch.zeros_like(x)
    for _ in range(3):
        y, z = model.deep_recursion(x, y.detach(), z.detach())
    torch.testing.assert_close(recurred.y, y)
    weight = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad((recurred.y * weight).sum(), x), torch.autograd.grad((y * weight).sum(), x)
    )


def test_hidden_state_trm_slides_its_window() -> None:
    torch.manual_seed(0)
    model = HiddenStateTRM(32, 3, 1, 4, 4, 2, 2, 2, 0.0, halting="none")
    states = torch.randn(2, 5, 32)
    windows = model(states, return_all_steps=True)
    assert len(windows) == 2 and all(window.shape == states.shape for window in windows)
    assert torch.equal(windows[0][:, :2], states[:, 3:])
    torch.testing.assert_close(model(states), windows[-1])
    assert (windows[0] - windows[1]).abs().max() > 1e-3
    with pytest.raises(InputError, match="3 positions are too few to replace 3"):
        model(states[:, :3])


def test_layout() -> None:
    valid = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
    think = torch.zeros(3, 5, dtype=torch.bool)
    think[0, 1] = think[1, 3] = think[1, 4] = True
    layout = lay_out(valid, think, soft_tokens=2)
    # The third sample has no <think>, and fills the columns of the others.
    assert [segment.tolist() for segment in layout.segments] == [
        [[0, 1, -1], [1, 2, 3], [0, 1, 2]],
        [[2], [4], [3]],
        [[3], [-1], [4]],
    ]
    assert [here.tolist() for here in layout.thinking] == [[True, True, False], [False, True, False]]
    # Columns 3, 4, 6 and 7 are soft tokens.
    assert layout.outputs.tolist() == [[0, 4, 5, 8, -1], [-1, 0, 1, 4, 7], [0, 1, 2, 5, 8]]


def test_wrapped_model_starts_with_its_heads_tokens() -> None:
    decoder = tiny_decoder(tie_word_embeddings=False)
    model = TRMForCausalLM.wrap(decoder, reasoner="sequence", d_compressed=16)
    entry = model.model.reasoner.entry
    embeddings, head = decoder.get_input_embeddings().weight, decoder.get_output_embeddings().weight
    expected = (embeddings - embeddings.mean(0)).T @ (head - head.mean(0))
    found = entry.projection.weight
    torch.testing.assert_close(found / found.norm(), expected / expected.norm())
    soft = entry(torch.randn(256, 32))
    torch.testing.assert_close(
        soft.square().mean().sqrt(), embeddings.square().mean().sqrt(), rtol=0.2, atol=0
    )
