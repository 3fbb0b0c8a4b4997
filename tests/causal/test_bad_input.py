"""Tests of unusual and bad input: it works, or one clear line says what to do."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from llm_trm.data.lessons import encode_prompts, lesson
from llm_trm.errors import InputError
from llm_trm.models.causal import add_think_tokens, create_smollm_trm_model
from llm_trm.models.causal.loading import load_latent_model, save_latent_model
from tests.causal.lora_world import SMALL, plain_tokenizer, write_language_model
from tests.causal.test_generation import generate
from tests.causal.test_loading import SEQUENCE, logits
from tests.causal.test_loading import trained as changed
from tests.causal.tiny import REASONERS, THINK, padded, tiny_decoder, tiny_trm

EXACT = {"rtol": 1e-4, "atol": 1e-4}


def one_line(refused: pytest.ExceptionInfo[InputError]) -> bool:
    return "\n" not in str(refused.value)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tokenizer_without_think(tied: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_language_model(tmp_path / "base", thinks=False, tied=tied)
    with caplog.at_level(logging.WARNING, "llm_trm"):
        model = create_smollm_trm_model(str(source), False, num_latents=2, trm_kwargs=SMALL, device="cpu")
    assert "added <think> and </think> to the tokenizer; embeddings grown from 258 to 260" in caplog.text
    assert model.get_input_embeddings().weight.shape[0] == model.lm_head.weight.shape[0] == 260
    ids = encode_prompts(model.tokenizer, ["1+1<think>", "2"], "plain")["input_ids"]
    assert int((ids == model.config.think_token_id).sum()) == 1
    assert model(input_ids=ids).trm_steps.tolist() == [[2], [0]]
    save_latent_model(model, model.tokenizer, tmp_path / "saved", base=str(source), prompt_form="plain")
    loaded = load_latent_model(tmp_path / "saved")
    found, expected = logits(loaded.model, loaded.tokenizer), logits(model.eval(), loaded.tokenizer)
    torch.testing.assert_close(found, expected, **EXACT)


def test_adapters_keep_the_rows_of_new_tokens(tmp_path: Path) -> None:
    source = write_language_model(tmp_path / "base", thinks=False)
    model = create_smollm_trm_model(str(source), True, 2, 2, SMALL, device="cpu").eval()
    save_latent_model(model, model.tokenizer, tmp_path / "saved", base=str(source), prompt_form="plain")
    loaded = load_latent_model(tmp_path / "saved")
    found, expected = logits(loaded.model, loaded.tokenizer), logits(model, loaded.tokenizer)
    torch.testing.assert_close(found, expected, **EXACT)


def test_existing_rows_are_reused(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_trm(decoder=tiny_decoder(vocab_size=300), think_token_id=None, end_think_token_id=None)
    tokenizer = plain_tokenizer()
    assert add_think_tokens(tokenizer, model) == ["<think>", "</think>"]
    assert "embeddings of 300 rows fit them" in caplog.text
    assert model.get_input_embeddings().weight.shape[0] == 300


@pytest.mark.parametrize("reasoner", REASONERS)
@pytest.mark.parametrize("row", [[THINK, 5, 6, 7], [5, 6, 7, THINK], [THINK, THINK], [5, THINK, THINK]])
def test_think_at_the_ends(row: list[int], reasoner: str) -> None:
    model = tiny_trm(reasoner=reasoner)
    ids = torch.tensor([row])
    out = model(input_ids=ids, labels=ids)
    assert out.loss.isfinite() and out.logits.shape[:2] == ids.shape and out.logits.isfinite().all()
    assert (out.trm_steps > 0).sum() == row.count(THINK)
    out.loss.backward()
    made = generate(model, ids)
    assert made.sequences.shape[1] == len(row) + 6
    torch.testing.assert_close(made.logits[0], out.logits[:, -1], **EXACT)
    with pytest.raises(InputError, match="positions before <think> are too few to replace 3") as refused:
        tiny_trm(reasoner=reasoner, window="always")(input_ids=ids)
    assert one_line(refused)


@pytest.mark.parametrize("use_trm", [True, False])
def test_a_prompt_longer_than_the_context(use_trm: bool) -> None:
    model = tiny_trm(decoder=tiny_decoder(max_position_embeddings=16))
    ids = torch.full((1, 17), 5)
    if not use_trm:
        assert model(input_ids=ids, use_trm=False).logits.isfinite().all()
        return
    for fails in (lambda: model(input_ids=ids), lambda: generate(model, ids)):
        with pytest.raises(InputError, match="17 tokens does not fit the decoder's context of 16") as refused:
            fails()
        assert one_line(refused)
    # Padding does not count.
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    assert generate(model, ids, mask).sequences.shape[1] == 23


@pytest.mark.parametrize("reasoner", REASONERS)
def test_empty_answers(reasoner: str) -> None:
    model = tiny_trm(reasoner=reasoner, decoder=tiny_decoder(vocab_size=300))
    tokenizer = plain_tokenizer()
    add_think_tokens(tokenizer, model)
    tokenizer.eos_token = None
    rows = [lesson(tokenizer, "1+1?", "", "plain"), lesson(tokenizer, "", "", "plain")]
    ids, mask = padded([row["input_ids"] for row in rows])
    labels = torch.full_like(ids, -100)
    for number, row in enumerate(rows):
        labels[number, : len(row["labels"])] = torch.tensor(row["labels"])
    loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    assert loss.isfinite()
    # Nothing after <think> is labelled, so nothing is learned from it.
    labels[:] = -100
    labels[:, 1] = ids[:, 1]
    assert model(input_ids=ids, attention_mask=mask, labels=labels).loss.isfinite()


@pytest.mark.parametrize("reasoner", REASONERS)
def test_batches_with_and_without_think(reasoner: str) -> None:
    model = tiny_trm(reasoner=reasoner, halting_loss_weight=0.0)
    rows = [[5, 6, THINK, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16, 17, 18]]
    ids, mask = padded(rows)
    labels = ids.masked_fill(mask == 0, -100)
    mixed = model(input_ids=ids, attention_mask=mask, labels=labels)
    assert mixed.trm_steps.tolist() == [[3], [0], [0]]
    mixed.loss.backward()
    trained = [weight for weight in model.model.reasoner.parameters() if weight.requires_grad]
    gradients = [weight.grad.clone() for weight in trained]
    model.zero_grad()
    alone = torch.tensor(rows[:1])
    # The other samples do not affect the reasoner's gradient; the loss is a mean over 4 of 12 labels.
    model(input_ids=alone, labels=alone, num_items_in_batch=12).loss.backward()
    for gradient, weight in zip(gradients, trained, strict=True):
        torch.testing.assert_close(gradient, weight.grad, rtol=1e-3, atol=1e-5)
    model.zero_grad()
    nobody = model(input_ids=ids[1:], attention_mask=mask[1:], labels=labels[1:])
    nobody.loss.backward()
    assert nobody.trm_steps is None and nobody.loss.isfinite()


def test_a_reasoner_of_another_width(tmp_path: Path) -> None:
    model = changed("arithmetic", False, SEQUENCE)
    save_latent_model(model, model.tokenizer, tmp_path, base="arithmetic", prompt_form="chat")
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"d_compressed": 16', '"d_compressed": 24'))
    with pytest.raises(InputError, match="the shapes of its weights") as refused:
        load_latent_model(tmp_path)
    assert one_line(refused)
