"""Tests of files, tokenizers, adapters and named entry points."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from llm_trm.data.reasoning import ReasoningDataset, create_sample_dataset
from llm_trm.errors import InputError
from llm_trm.models.causal import (
    TRMConfig,
    TRMForCausalLM,
    TRMModel,
    add_lora,
    add_think_tokens,
    create_smollm_trm_model,
)
from llm_trm.models.tiny import tiny_tokenizer
from tests.causal.tiny import KINDS, REASONERS, ROWS, THINK, padded, tiny_decoder, tiny_trm


def logits(model: PreTrainedModel) -> Tensor:
    ids, mask = padded(ROWS, "left")
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits


def described(model: PreTrainedModel) -> dict[str, object]:
    """The configuration without entries that only a file or a requested dtype adds."""
    found = model.config.to_dict()
    found["text_config"].pop("dtype")
    found.pop("_name_or_path")
    return found


def aligned(model: PreTrainedModel) -> PreTrainedModel:
    """``model`` with weights aligned to 64 bytes, as torch allocates them; weights in a file are unaligned.

    oneMKL's rounding depends on the alignment (observed on Zen 3).
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reasoner", REASONERS)
def test_round_trip(kind: str, reasoner: str, tmp_path: Path) -> None:
    decoder = tiny_decoder(kind, tie_word_embeddings=kind == "smollm3")
    model = tiny_trm(reasoner=reasoner, decoder=decoder, window="always", num_latents=2, soft_tokens=2)
    model.config.window = "slide"
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded = aligned(AutoModelForCausalLM.from_pretrained(tmp_path).eval())
    assert type(loaded) is TRMForCausalLM and type(loaded.model.decoder) is type(decoder.base_model)
    assert described(loaded) == described(model)
    assert torch.equal(logits(loaded), logits(model))
    tied = loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert tied == (kind == "smollm3")
    backbone = aligned(AutoModel.from_pretrained(tmp_path).eval())
    ids = torch.tensor([ROWS[0]])
    assert type(backbone) is TRMModel
    assert torch.equal(backbone(input_ids=ids)[0], model.model(input_ids=ids)[0])


def test_new_model_from_configuration_is_initialised() -> None:
    config = tiny_trm().config
    torch.manual_seed(0)
    model = TRMForCausalLM(config)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model.model.reasoner.trm.halt_head.bias.item() == -5.0
    # The soft tokens have the scale of the embeddings.
    size = model.get_input_embeddings().weight.square().mean().sqrt()
    soft = model.model.reasoner.entry(torch.randn(64, 32))
    torch.testing.assert_close(soft.square().mean().sqrt(), size, rtol=0.2, atol=0)


def test_rejects_mismatched_files(tmp_path: Path) -> None:
    model = tiny_trm()
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="the shapes of its weights"):
        TRMForCausalLM.from_pretrained(tmp_path, num_latents=5)
    with pytest.raises(InputError, match=r"lacks .* weights"):
        TRMForCausalLM.from_pretrained(tmp_path, n_layers=2)
    tiny_decoder().save_pretrained(tmp_path / "plain")
    with pytest.raises(InputError, match="this is a llama model"):
        TRMForCausalLM.from_pretrained(tmp_path / "plain")
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "trm" and written["text_config"]["model_type"] == "llama"
    with pytest.raises(InputError, match="attention over a sequence"):
        TRMConfig({"model_type": "mamba"})
    with pytest.raises(InputError, match="not a text-only decoder"):
        TRMConfig({"model_type": "t5"})


def test_adds_missing_tokens_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(32)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0")
    model = tiny_trm(think_token_id=None, end_think_token_id=None)
    assert add_think_tokens(tokenizer, model) == ["<think>", "</think>"]
    assert "added <think> and </think> to the tokenizer; embeddings grown from 32 to 34 rows" in caplog.text
    assert (model.config.think_token_id, model.config.end_think_token_id) == (32, 33)
    assert model.config.text_config.vocab_size == 34
    ids = torch.tensor([tokenizer.encode("w5 w6 <think> w7")])
    out = model(input_ids=ids, labels=ids)
    assert out.logits.shape[-1] == 34 and out.trm_steps.tolist() == [[3]]
    caplog.clear()
    assert add_think_tokens(tokenizer, model) == [] and not caplog.text


@pytest.mark.parametrize("merged", [False, True])
def test_adapters(merged: bool, tmp_path: Path) -> None:
    from peft import PeftModel

    decoder = tiny_decoder()
    adapted = add_lora(tiny_trm(decoder=decoder), r=2)
    trained = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert trained and all("lora_" in name or ".reasoner.modules_to_save." in name for name in trained)
    ids, mask = padded(ROWS)
    adapted.train()(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    for name, weight in adapted.named_parameters():
        assert (weight.grad is not None) == (name in trained), name
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if name in trained:
                weight.add_(0.1 * torch.randn_like(weight))
    adapted.eval()
    if merged:
        expected = logits(adapted)
        adapted.merge_and_unload().save_pretrained(tmp_path)
        found = logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval())
    else:
        expected = logits(adapted)
        adapted.save_pretrained(tmp_path)
        found = logits(PeftModel.from_pretrained(tiny_trm(), tmp_path).eval())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("use_lora", [False, True])
def test_the_arithmetic_model_by_name(use_lora: bool) -> None:
    model = create_smollm_trm_model("arithmetic", use_lora, 4, 8, {"supervision_steps": 1, "n_layers": 1})
    tokenizer = model.tokenizer
    names = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert names and all(("lora_" in name) or (".reasoner." in name) for name in names)
    assert use_lora == any("lora_" in name for name in names)
    data = ReasoningDataset(create_sample_dataset(), tokenizer, max_length=96)
    batch = {name: torch.stack([data[0][name], data[1][name]]) for name in data[0]}
    loss = model(**batch).loss
    loss.backward()
    assert loss.isfinite()
    made = model.generate(
        **tokenizer(["1+2<think>", "3+4"], return_tensors="pt", padding=True, return_token_type_ids=False),
        max_new_tokens=3,
    )
    assert made.shape[0] == 2


def test_no_such_model() -> None:
    with pytest.raises(InputError, match="cannot be loaded"):
        create_smollm_trm_model("/nowhere/at/all")


def test_reasoning_data() -> None:
    problems = create_sample_dataset()
    assert len(problems) == 10 and all(item.keys() == {"question", "answer"} for item in problems)
    tokenizer = tiny_tokenizer()
    item = ReasoningDataset([{"question": "1+1?", "answer": "2"}], tokenizer, max_length=40)[0]
    kept = item["input_ids"][item["attention_mask"] != 0]
    assert tokenizer.decode(kept) == "Question: 1+1?\nAnswer: <think> 2"
    assert (item["labels"][item["attention_mask"] == 0] == -100).all()
    assert torch.equal(item["labels"][item["attention_mask"] != 0], kept)
    think = tokenizer.convert_tokens_to_ids("<think>")
    empty = ReasoningDataset([{"question": "", "answer": ""}], tokenizer, add_think_token=False)[0]
    assert think not in empty["input_ids"]
    with pytest.raises(InputError, match="item 0 has no answer"):
        ReasoningDataset([{"question": "1+1?"}], tokenizer)


def test_an_empty_answer_trains() -> None:
    model = tiny_trm()
    ids = torch.tensor([[5, 6, THINK]])
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite()
