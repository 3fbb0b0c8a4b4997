"""Tests of saved models with a recursion (complete, adapters, merged), and of starts from phase 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_trm.errors import InputError
from llm_trm.models.causal import create_smollm_trm_model
from llm_trm.models.causal.loading import FACTS_FILE, load_latent_model, save_latent_model
from llm_trm.models.causal.starting import require_width, start_from_phase2
from llm_trm.models.compression import DimensionCompressor, save_compressor
from llm_trm.models.phase2 import COMPRESSOR_FOLDER
from llm_trm.models.sequence_trm import SequenceTRM, save_sequence_trm
from tests.causal.lora_world import SMALL, write_language_model
from tests.causal.tiny import tiny_decoder, tiny_trm

SEQUENCE = {"reasoner": "sequence", "d_compressed": 16, "n_heads": 4, **SMALL}
LATENTS = {"n_heads": 4, "compression_heads": 4, **SMALL}


def trained(source: str | Path, use_lora: bool, settings: dict[str, Any]) -> Any:
    """A model with modified weights."""
    torch.manual_seed(0)
    model = create_smollm_trm_model(str(source), use_lora, 2, 3, settings, device="cpu")
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn_like(weight))
    return model.eval()


def logits(model: Any, tokenizer: Any) -> Tensor:
    given = tokenizer(["1+2<think>3", "4<think>"], padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits


@pytest.mark.parametrize("settings", [SEQUENCE, LATENTS])
@pytest.mark.parametrize("how", ["whole", "adapters", "merged"])
def test_round_trip(how: str, settings: dict[str, Any], tmp_path: Path) -> None:
    base = write_language_model(tmp_path / "base")
    model = trained(base, how != "whole", settings)
    tokenizer = model.tokenizer
    expected = logits(model, tokenizer)
    folder = tmp_path / "deep" / "folder"
    save_latent_model(
        model, tokenizer, folder, base=str(base), prompt_form="plain", merge=how == "merged", steps=7
    )
    assert (folder / "adapter_model.safetensors").exists() == (how == "adapters")
    loaded = load_latent_model(folder)
    assert loaded.has_adapters == (how == "adapters")
    assert (loaded.prompt_form, loaded.facts, loaded.base) == ("plain", {"steps": 7}, str(base.resolve()))
    assert loaded.tokenizer.padding_side == "left" and not loaded.model.training
    assert not any(weight.requires_grad for weight in loaded.model.parameters())
    torch.testing.assert_close(logits(loaded.model, tokenizer), expected, rtol=1e-3, atol=1e-3)
    names = ("reasoner", "supervision_steps", "n_latent_steps", "think_token_id", "tokens_per_thought")
    assert [getattr(loaded.config, name) for name in names] == [getattr(model.config, name) for name in names]


@pytest.mark.parametrize("how", ["whole", "adapters"])
@pytest.mark.parametrize("halting", ["sample", "none"])
def test_to_be_trained_further(how: str, halting: str, tmp_path: Path) -> None:
    model = trained("arithmetic", how == "adapters", {**SEQUENCE, "halting": halting})
    save_latent_model(model, model.tokenizer, tmp_path, base="arithmetic", prompt_form="chat")
    loaded = load_latent_model(tmp_path, trainable=True)
    names = {name for name, weight in loaded.model.named_parameters() if weight.requires_grad}
    wanted = ".reasoner.modules_to_save." if how == "adapters" else "model.reasoner."
    assert names and all(wanted in name for name in names)
    assert any("halt_head" in name for name in names) == (halting == "sample")


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        load_latent_model(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is not a folder"):
        load_latent_model(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError):
        load_latent_model(tmp_path / "empty")
    plain = write_language_model(tmp_path / "plain")
    with pytest.raises(InputError, match="is a smollm3 model without a recursion"):
        load_latent_model(plain)
    model = trained(plain, True, SEQUENCE)
    adapters = tmp_path / "adapters"
    save_latent_model(model, model.tokenizer, adapters, base=str(plain), prompt_form="chat")
    known = json.loads((adapters / FACTS_FILE).read_text())
    (adapters / FACTS_FILE).write_text(json.dumps({**known, "base": str(tmp_path / "gone")}))
    with pytest.raises(InputError, match="gone cannot be loaded"):
        load_latent_model(adapters)
    (adapters / FACTS_FILE).unlink()
    with pytest.raises(InputError, match="names their base"):
        load_latent_model(adapters)


def test_adapters_of_another_language_model(tmp_path: Path) -> None:
    model = trained(write_language_model(tmp_path / "base"), True, SEQUENCE)
    folder = tmp_path / "adapters"
    # Width 128 instead of 32.
    save_latent_model(model, model.tokenizer, folder, base="arithmetic", prompt_form="chat")
    with pytest.raises(InputError, match="does not fit the language model arithmetic") as refused:
        load_latent_model(folder)
    assert "\n" not in str(refused.value)


def write_phase2(folder: Path, width: int = 32, **sizes: int) -> Path:
    torch.manual_seed(5)
    trm = SequenceTRM(**{"d_compressed": 16, "n_layers": 1, "n_heads": 4, "n_latent_steps": 1, **sizes})
    folder.mkdir()
    save_sequence_trm(trm, folder, max_steps=3, halting="batch", language_model="somebody/else")
    save_compressor(DimensionCompressor(width, trm.config.d_compressed), folder / COMPRESSOR_FOLDER)
    return folder


@pytest.mark.parametrize("use_lora", [False, True])
def test_starts_from_phase2(use_lora: bool, tmp_path: Path) -> None:
    from llm_trm.models.causal import add_lora

    start = start_from_phase2(write_phase2(tmp_path / "phase2"))
    assert start.language_model == "somebody/else"
    require_width(start, 32)
    model: Any = tiny_trm(**start.settings)
    assert (model.config.supervision_steps, model.config.halting) == (3, "batch")
    inner = model
    if use_lora:
        model = add_lora(model, r=2)
    start.load_into(model)
    reasoner = inner.model.reasoner
    # The trained copy, not the original that peft keeps.
    reasoner = reasoner.modules_to_save["default"] if use_lora else reasoner
    for part, given in ((reasoner.trm, start.trm), (reasoner.compressor, start.compressor)):
        assert all(
            torch.equal(weight, given.state_dict()[name]) for name, weight in part.state_dict().items()
        )
        assert part.state_dict()


def test_refuses_a_start_of_other_sizes(tmp_path: Path) -> None:
    start = start_from_phase2(write_phase2(tmp_path / "phase2", width=48))
    with pytest.raises(InputError, match=r"states of width 48 .*language model's have 32") as refused:
        require_width(start, 32)
    assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match="where this model has"):
        start.load_into(tiny_trm(**start.settings))
    fitting = start_from_phase2(write_phase2(tmp_path / "fitting"))
    with pytest.raises(InputError, match="has nothing where this model has net"):
        fitting.load_into(tiny_trm(**{**fitting.settings, "n_layers": 2}))
    with pytest.raises(InputError, match="no sequence reasoner"):
        fitting.load_into(tiny_trm(decoder=tiny_decoder()))
    with pytest.raises(InputError):
        start_from_phase2(tmp_path / "nothing")
