"""Tests of the recursion in a forward pass: its position, its effect and its gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llm_trm.errors import InputError
from llm_trm.models.causal import TRMForCausalLM
from tests.causal.tiny import KINDS, PAD, REASONERS, ROWS, THINK, padded, tiny_decoder, tiny_trm

EXACT = {"rtol": 1e-4, "atol": 1e-4}


def row_logits(model: TRMForCausalLM, row: list[int], **options: object) -> torch.Tensor:
    return model(input_ids=torch.tensor([row]), **options).logits[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reasoner", REASONERS)
def test_batch_is_its_samples_on_either_side_of_padding(kind: str, reasoner: str) -> None:
    model = tiny_trm(kind, reasoner)
    for side in ("left", "right"):
        ids, mask = padded(ROWS, side)
        logits = model(input_ids=ids, attention_mask=mask).logits
        assert logits.shape == (*ids.shape, 32)
        for number, row in enumerate(ROWS):
            torch.testing.assert_close(logits[number][mask[number] != 0], row_logits(model, row), **EXACT)


@pytest.mark.parametrize("reasoner", REASONERS)
def test_with_cache_as_without(reasoner: str) -> None:
    model = tiny_trm(reasoner=reasoner)
    ids, mask = padded(ROWS, "left")
    recomputed = model(input_ids=ids, attention_mask=mask).logits
    assert recomputed.requires_grad
    with torch.no_grad():
        inside = model(input_ids=ids, attention_mask=mask, use_cache=False)
        cached = model(input_ids=ids, attention_mask=mask, use_cache=True)
    assert inside.past_key_values is None and cached.past_key_values is not None
    torch.testing.assert_close(inside.logits, recomputed, **EXACT)
    torch.testing.assert_close(cached.logits, recomputed, **EXACT)


def test_equals_the_decoder_on_prefix_soft_tokens_and_continuation() -> None:
    decoder = tiny_decoder()
    model = tiny_trm(decoder=decoder)
    before, behind = [5, 6, 7], [9, 10]
    with torch.no_grad():
        states = decoder.model(input_ids=torch.tensor([[*before, THINK]])).last_hidden_state[:, :-1]
        thought = model.model.reasoner(states, torch.ones(1, 3, dtype=torch.bool))
        embed = decoder.get_input_embeddings()
        parts = [embed(torch.tensor([[*before, THINK]])), thought.soft_tokens, embed(torch.tensor([behind]))]
        expected = decoder(inputs_embeds=torch.cat(parts, 1)).logits
        found = model(input_ids=torch.tensor([[*before, THINK, *behind]])).logits
    # The states of <think> itself and of all soft tokens except the last are unused.
    torch.testing.assert_close(found, expected[:, [0, 1, 2, 6, 7, 8]], **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_recursion_it_is_the_plain_model(kind: str) -> None:
    decoder = tiny_decoder(kind)
    ids, mask = padded(ROWS, "left")
    plain = decoder(input_ids=ids, attention_mask=mask, labels=ids)
    model = tiny_trm(decoder=decoder)
    found = model(input_ids=ids, attention_mask=mask, labels=ids, use_trm=False)
    assert torch.equal(found.logits, plain.logits) and torch.equal(found.loss, plain.loss)


@pytest.mark.parametrize("reasoner", REASONERS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_labels_reach_every_weight_of_the_reasoner(reasoner: str, checkpointing: bool) -> None:
    model = tiny_trm(reasoner=reasoner).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids, mask = padded(ROWS)
    # Only after the first <think>: before it, nothing can depend on the reasoner.
    labels = ids.masked_fill(((ids == THINK).cumsum(1) == 0) | (ids == THINK) | (mask == 0), -100)
    model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        # A gradient of 1e-6 of the weights would not train anything.
        assert parameter.grad.norm() > 1e-5 * parameter.norm(), name


def test_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_trm().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        ids, mask = padded(ROWS)
        model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("reasoner", REASONERS)
def test_only_positions_after_think_depend_on_the_recursion(reasoner: str) -> None:
    model = tiny_trm(reasoner=reasoner)
    ids, mask = padded(ROWS)
    with torch.no_grad():
        first = model(input_ids=ids, attention_mask=mask).logits
        for parameter in model.model.reasoner.trm.net.parameters():
            parameter.add_(torch.randn_like(parameter))
        second = model(input_ids=ids, attention_mask=mask).logits
    changed = (first - second).abs().amax(-1) > 1e-3
    expected = ((ids == THINK).cumsum(1) > 0) & (mask != 0)
    assert torch.equal(changed, expected)


def test_the_second_thought_reads_the_first() -> None:
    model = tiny_trm()
    seen: list[int] = []
    model.model.reasoner.register_forward_pre_hook(lambda _, given: seen.append(int(given[1].sum())))
    row_logits(model, [12, 13, THINK, 14, 15, 16, THINK, 17])
    # Two tokens; then these, <think>, three soft tokens and three tokens.
    assert seen == [2, 9]


def test_positions_count_tokens_and_soft_tokens() -> None:
    model = tiny_trm()
    positions: list[torch.Tensor] = []
    model.model.decoder.register_forward_pre_hook(
        lambda _, args, given: positions.append(given["position_ids"]), with_kwargs=True
    )
    ids, mask = padded([[5, 6, THINK, 7], [8, THINK]], "left")
    model(input_ids=ids, attention_mask=mask)
    assert positions[-1][0].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert positions[-1][1, [0, 1, 3, 4, 5]].tolist() == [0, 1, 2, 3, 4]


def test_loss_is_shifted_and_divided_as_asked() -> None:
    model = tiny_trm(halting_loss_weight=0.0)
    ids, mask = padded(ROWS)
    labels = ids.masked_fill(mask == 0, -100)
    out = model(input_ids=ids, attention_mask=mask, labels=labels)
    each = F.cross_entropy(out.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    count = (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(out.loss, each.sum() / count)
    counted = model(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=2 * count)
    torch.testing.assert_close(counted.loss, out.loss / 2)
    assert out.halting_loss is None
    assert not model.model.reasoner.trm.halt_head.weight.requires_grad


def test_halting_loss_knows_which_answers_were_right() -> None:
    model = tiny_trm(halting_loss_weight=0.5)
    # Different logits, so that mixing them up has an effect.
    torch.nn.init.normal_(model.model.reasoner.trm.halt_head.weight)
    ids = torch.tensor([[5, THINK, 6, 7, THINK, 8]])
    logits = model(input_ids=ids).logits
    # Correct after the second <think>, wrong after the first.
    right = int(logits[0, 4].argmax())
    labels = torch.tensor([[-100, -100, (int(logits[0, 1].argmax()) + 1) % 32, -100, -100, right]])
    out = model(input_ids=ids, labels=labels)
    wanted = F.binary_cross_entropy_with_logits(out.halt_logits, torch.tensor([[0.0, 1.0]]))
    torch.testing.assert_close(out.halting_loss, wanted)
    plain = F.cross_entropy(out.logits[0, [1, 4]], labels[0, [2, 5]])
    torch.testing.assert_close(out.loss, plain + 0.5 * wanted)
    # Two of the four labels of an accumulated batch are here.
    counted = model(input_ids=ids, labels=labels, num_items_in_batch=4)
    torch.testing.assert_close(counted.loss, out.loss / 2)


def test_samples_halt_alone_and_in_training_as_in_inference() -> None:
    model = tiny_trm(supervision_steps=4)
    rows = [ROWS[0], ROWS[2], ROWS[3]]
    ids, mask = padded(rows)
    with torch.no_grad():
        head = model.model.reasoner.trm.halt_head
        head.weight.normal_()
        # Between the samples' logits at the first step, so that only one of them halts there.
        model.model.reasoner.trm.n_supervision_steps = 1
        logits = model(input_ids=ids, attention_mask=mask).halt_logits
        head.bias.sub_(logits.flatten().sort().values[1:].mean())
        model.model.reasoner.trm.n_supervision_steps = 4
        cached = model(input_ids=ids, attention_mask=mask)
    assert len(set(cached.trm_steps[:, 0].tolist())) > 1
    trained = model(input_ids=ids, attention_mask=mask)
    assert torch.equal(trained.trm_steps, cached.trm_steps)
    torch.testing.assert_close(trained.logits, cached.logits, **EXACT)
    for number, row in enumerate(rows):
        alone = model(input_ids=torch.tensor([row]))
        assert alone.trm_steps[0, 0] == cached.trm_steps[number, 0]


def test_dimension_compressor_reports_its_reconstruction_error() -> None:
    model = tiny_trm(reasoner="sequence")
    ids = torch.tensor([[5, 6, 7, THINK, 8]])
    out = model(input_ids=ids, output_hidden_states=True)
    states = out.hidden_states[-1][:, :3]
    compressor = model.model.reasoner.compressor
    lost = (compressor.decompress(compressor(states)) - states).square().sum() / states.square().sum()
    torch.testing.assert_close(out.reconstruction_error, lost.detach())
    assert all(states.shape == (1, 5, 32) for states in out.hidden_states)


def test_latents_report_their_reconstruction_error() -> None:
    reasoner = tiny_trm(reasoner="latents", num_latents=4).model.reasoner
    context = torch.randn(2, 9, 32)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, :4] = False
    context[1, :4] = torch.nan
    with torch.no_grad():
        latents = reasoner.trm.compressor(context, mask)
        found = reasoner(context, mask).reconstruction_error
    for row in range(2):
        states, basis = context[row, mask[row]].double(), latents[row].double()
        rest = states - torch.linalg.lstsq(basis.T, states.T).solution.T @ basis
        expected = rest.square().sum() / states.square().sum()
        assert 0.1 < expected < 0.99
        torch.testing.assert_close(found[row].double(), expected, rtol=1e-3, atol=0)


def test_rounds_for_other_processes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_trm()
    ids, mask = padded([ROWS[0], ROWS[4]])
    expected = model(input_ids=ids, attention_mask=mask)
    monkeypatch.setattr(type(model.model), "_rounds", lambda *_: 3)
    found = model(input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(found.logits, expected.logits, **EXACT)
    assert found.trm_steps.tolist() == [[3, 0, 0], [0, 0, 0]]
    model.train()
    found = model(input_ids=torch.tensor([ROWS[4]]), labels=torch.tensor([ROWS[4]]))
    found.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.model.reasoner.parameters())


def test_gaps_may_hold_anything() -> None:
    model = tiny_trm()
    ids, mask = padded(ROWS, "left")
    expected = model(input_ids=ids, attention_mask=mask).logits
    found = model(input_ids=ids.masked_fill(mask == 0, THINK), attention_mask=mask).logits
    torch.testing.assert_close(found, expected, **EXACT)


def test_a_batch_without_padding() -> None:
    model = tiny_trm()
    rows = [ROWS[0], ROWS[4][:8]]
    logits = model(input_ids=torch.tensor(rows)).logits
    for number, row in enumerate(rows):
        torch.testing.assert_close(logits[number], row_logits(model, row), **EXACT)


def test_bfloat16_stays_finite() -> None:
    model = tiny_trm().to(torch.bfloat16)
    ids, mask = padded(ROWS)
    out = model(input_ids=ids, attention_mask=mask, labels=ids)
    assert out.logits.dtype == torch.bfloat16 and out.loss.isfinite()


@pytest.mark.parametrize("lines", [1, 3])
def test_a_mask_of_padding_alone(lines: int) -> None:
    model = tiny_trm()
    ids = torch.full((lines, 4), PAD)
    assert not model(input_ids=ids, attention_mask=torch.zeros_like(ids)).logits.any()


def test_refusals() -> None:
    model = tiny_trm()
    ids = torch.tensor([[5, THINK, 6]])
    with pytest.raises(InputError, match="use_trm=False"):
        model(inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(InputError, match="attention_mask"):
        model(input_ids=ids, attention_mask=torch.ones(1, 2))
    with pytest.raises(InputError, match="computes positions itself"):
        model(input_ids=ids, position_ids=torch.tensor([[0, 0, 1]]))
    with pytest.raises(InputError, match="context of 128"):
        model(input_ids=torch.full((1, 129), 5))
    with pytest.raises(InputError, match="output_attentions"):
        model(input_ids=ids, output_attentions=True)
    with pytest.raises(InputError, match="do not match the logits"):
        model(input_ids=ids, labels=ids, logits_to_keep=1)
    model.config.think_token_id = None
    with pytest.raises(InputError, match="add_think_tokens"):
        model(input_ids=ids)


def test_rejects_unsupported_decoders() -> None:
    with pytest.raises(InputError, match="scales or caps"):
        tiny_trm(decoder=tiny_decoder("granite", logits_scaling=2.0))
    with pytest.raises(InputError, match="heads"):
        tiny_trm(n_heads=5)
    with pytest.raises(InputError, match="width of 32"):
        tiny_trm(reasoner="sequence", d_compressed=32)
    with pytest.raises(InputError, match="reasoner must be one of"):
        tiny_trm(reasoner="other")


def test_wraps_a_decoder_with_dropout_in_training_mode() -> None:
    decoder = tiny_decoder("gpt2").train()
    assert decoder.config.resid_pdrop > 0
    wrapped = TRMForCausalLM.wrap(decoder, num_latents=3, soft_tokens=3, d_compressed=16, n_heads=4)
    assert wrapped.training and decoder.transformer.drop.training


def test_says_that_weights_are_nan_rather_than_scaled() -> None:
    decoder = tiny_decoder()
    decoder.model.norm.weight.data[0] = torch.nan
    with pytest.raises(InputError, match="NaN or infinity"):
        tiny_trm(decoder=decoder)
