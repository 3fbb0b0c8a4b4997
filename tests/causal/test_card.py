"""Tests of model cards: their content, their code, and their upload to the hub."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError

from llm_trm.models.causal.card import EVALUATION_FILE, fingerprint, read_evaluation, write_evaluation
from llm_trm.models.causal.loading import load_latent_model, save_latent_model
from tests.causal.saved import latent_model, save

RECORD: dict[str, Any] = {
    "time": "2026-11-22T19:00:00+00:00",
    "versions": {"torch": "2.13.0", "llm-trm": "0.1.0"},
    "machine": {"device": "a slow machine"},
    "data_words": "the arithmetic world",
    "batch_size": 64,
    "max_new_tokens": 256,
    "modes": {
        mode: {
            "problems": 500,
            "accuracy": accuracy,
            "interval": [accuracy - 0.02, accuracy + 0.02],
            "tokens": tokens,
            "seconds": 0.001 * tokens,
            "steps": 2.5 if mode == "latent" else 0.0,
            "soft_tokens": 1.0 if mode == "latent" else 0.0,
        }
        for mode, accuracy, tokens in (("no-think", 0.25, 2.0), ("think", 0.95, 20.0), ("latent", 0.75, 4.0))
    },
    "ratios": {"gap_closed": 0.714, "gap_closed_interval": [0.65, 0.78], "tokens": 0.2, "seconds": 0.2},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(latent_model(), tmp_path / "lora", learning_rate=0.001)


def readme(folder: Path) -> str:
    return (folder / "README.md").read_text()


def run_the_code(folder: Path) -> str:
    """The output of the card's Python code."""
    (code,) = re.findall(r"```python\n(.*?)```", readme(folder), re.DOTALL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    return printed.getvalue()


@pytest.mark.parametrize("form", ["adapters", "merged", "whole"])
def test_the_card_is_ours_and_its_code_runs(form: str, tmp_path: Path) -> None:
    model = latent_model()
    tokenizer = model.tokenizer
    if form == "whole":
        model = model.unload()
        model.tokenizer = tokenizer
    out = tmp_path / "run"
    save_latent_model(
        model, tokenizer, out, base="arithmetic", prompt_form="chat", merge=form == "merged", steps=7
    )
    text = readme(out)
    metadata = ModelCard(text).data.to_dict()
    assert metadata["library_name"] == "llm-trm" and metadata["pipeline_tag"] == "text-generation"
    assert ("lora" in metadata["tags"]) == (form == "adapters") == ("| LoRA | r 4" in text)
    assert "base_model" not in metadata, "arithmetic is not a model on the hub"
    assert "| d_compressed | 16 |" in text and "num_latents" not in text and "| steps | 7 |" in text
    assert "Nothing yet" in text and "More Information Needed" not in text
    loaded = load_latent_model(out)
    assert loaded.has_adapters == (form == "adapters")
    printed = run_the_code(out)
    assert printed.startswith("<think>") and printed.count("\n") == 1


def test_base_is_named_if_it_is_on_the_hub(tmp_path: Path) -> None:
    model = latent_model()
    save_latent_model(model, model.tokenizer, tmp_path, base="HuggingFaceTB/SmolLM3-3B", prompt_form="chat")
    assert ModelCard(readme(tmp_path)).data.to_dict()["base_model"] == "HuggingFaceTB/SmolLM3-3B"
    assert "in the folder that it was in" not in readme(tmp_path)


def test_peft_alone_writes_a_folder_that_loads(tmp_path: Path) -> None:
    model = latent_model()
    model.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    assert "# " + tmp_path.name in readme(tmp_path)
    assert fingerprint(load_latent_model(tmp_path).model) == fingerprint(model)


def test_evaluation_belongs_to_its_weights(folder: Path, tmp_path: Path) -> None:
    model = load_latent_model(folder).model
    assert write_evaluation(model, folder, RECORD)
    for words in (
        "| latent | 75.0% [73.0, 77.0] | 4.0 | 4.0 | 2.50 | 1.0 |",
        "closes 71.4%",
        "a slow machine",
    ):
        assert words in readme(folder)

    again = load_latent_model(folder, dtype=torch.bfloat16)
    assert fingerprint(again.model) == fingerprint(model)
    again = load_latent_model(folder)
    save_latent_model(
        again.model, again.tokenizer, tmp_path / "merged", base=again.base, prompt_form="chat", merge=True
    )
    assert "closes 71.4%" in readme(tmp_path / "merged")
    assert load_latent_model(tmp_path / "merged").model.about.evaluation is not None

    trained = load_latent_model(folder)
    with torch.no_grad():
        for name, weight in trained.model.named_parameters():
            if "modules_to_save" in name and name.endswith("entry.norm.weight"):
                weight += 0.01
    save_latent_model(trained.model, trained.tokenizer, folder, base=trained.base, prompt_form="chat")
    assert "Nothing yet" in readme(folder) and not (folder / EVALUATION_FILE).exists()


def test_evaluation_is_dropped_for_training(folder: Path) -> None:
    write_evaluation(load_latent_model(folder).model, folder, RECORD)
    assert load_latent_model(folder, trainable=True).model.about.evaluation is None


def test_a_card_written_by_hand_stays(folder: Path) -> None:
    model = load_latent_model(folder).model
    (folder / "README.md").write_text("# Mine\n")
    assert not write_evaluation(model, folder, RECORD)
    assert readme(folder) == "# Mine\n"
    found = read_evaluation(folder)
    assert found is not None and found["ratios"] == RECORD["ratios"]


def test_a_trainers_card_does_not_stay(folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import Trainer, TrainingArguments

    latent = load_latent_model(folder)
    arguments = TrainingArguments(str(tmp_path / "trainer"), report_to=[], use_cpu=True)
    Trainer(latent.model, arguments).create_model_card()
    (folder / "README.md").unlink()
    PeftModel.create_or_update_model_card(latent.model, str(folder))
    peft = readme(folder)
    transformers = (tmp_path / "trainer" / "README.md").read_text()
    trl = "---\ntags: [trl]\n---\n# Model Card for lora\n\nIt has been trained using [TRL](https://x).\n"
    for text in (peft, transformers, trl):
        assert "## Measured" not in text
        (folder / "README.md").write_text(text)
        save_latent_model(latent.model, latent.tokenizer, folder, base=latent.base, prompt_form="chat")
        assert "## Measured" in readme(folder)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A simulated repository: uploaded texts by file name."""
    files: dict[str, str] = {}

    class Repository:
        def __init__(self, repo_id: str) -> None:
            self.repo_id = repo_id

    def create_commit(_: HfApi, *, operations: list[Any], **__: Any) -> str:
        for operation in operations:
            content = Path(operation.path_or_fileobj).read_bytes()
            files[operation.path_in_repo] = content.decode(errors="replace")
        return "committed"

    def load(repo_id: str, **_: Any) -> ModelCard:
        assert repo_id == "me/thinker"
        if "README.md" not in files:
            raise EntryNotFoundError("no card")
        return ModelCard(files["README.md"])

    monkeypatch.setattr(HfApi, "create_repo", lambda _, repo_id, **__: Repository(repo_id))
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(ModelCard, "load", load)
    return files


@pytest.mark.parametrize("merge", [False, True])
def test_the_hub_gets_our_card(merge: bool, folder: Path, tmp_path: Path, hub: dict[str, str]) -> None:
    latent = load_latent_model(folder)
    write_evaluation(latent.model, folder, RECORD)
    if merge:
        out = tmp_path / "merged"
        save_latent_model(latent.model, latent.tokenizer, out, base=None, prompt_form="chat", merge=True)
        latent = load_latent_model(out)
    latent.push_to_hub("me/thinker")
    text = hub["README.md"]
    assert "# thinker\n" in text and 'load_latent_model("me/thinker")' in text and "closes 71.4%" in text
    assert str(tmp_path) not in text and "automatically generated" not in text
    wanted = "model.safetensors" if merge else "adapter_model.safetensors"
    assert {wanted, "latent.json", EVALUATION_FILE, "tokenizer.json"} <= hub.keys()

    # Our card is overwritten, one edited by hand is not.
    hub["README.md"] = text.replace("closes 71.4%", "closes 99.9%")
    latent.model.push_to_hub("me/thinker")
    assert "closes 71.4%" in hub["README.md"]
    hub["README.md"] = "# Mine\n"
    latent.model.push_to_hub("me/thinker")
    assert hub["README.md"].strip().endswith("# Mine")


def test_saving_with_push_to_hub_uploads_our_card(tmp_path: Path, hub: dict[str, str]) -> None:
    whole = latent_model().unload()
    push: Callable[..., Any] = whole.save_pretrained
    push(tmp_path / "thinker", push_to_hub=True, repo_id="me/thinker")
    assert "# thinker\n" in hub["README.md"] and "Nothing yet" in hub["README.md"]
