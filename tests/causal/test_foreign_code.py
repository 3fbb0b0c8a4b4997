"""Tests that a model's Python files run only on request, and never because of a line of standard input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from transformers import AutoModelForCausalLM, GenerationMixin, dynamic_module_utils

from llm_trm.cli import main
from llm_trm.data.questions import load_solved
from llm_trm.errors import InputError
from llm_trm.models.causal.loading import FACTS_FILE, load_latent_model, save_latent_model
from llm_trm.models.loading import load_thinking_model
from tests.causal.lora_world import write_language_model, write_rows
from tests.causal.saved import latent_model, save

_CODE = """
from pathlib import Path

from transformers import SmolLM3Config, SmolLM3ForCausalLM

Path({marker!r}).touch()


class ForeignConfig(SmolLM3Config):
    model_type = "foreign"


class ForeignForCausalLM(SmolLM3ForCausalLM):
    config_class = ForeignConfig
"""
_TINY = ("--steps", "1", "-n", "1", "-T", "1", "--supervision-steps", "1", "--layers", "1")
#: Commands that load a language model, with the arguments of a short run.
COMMANDS = {
    "generate": ("generate", "--max-new-tokens", "2", "1+1"),
    "generate from stdin": ("generate", "--max-new-tokens", "2"),
    "datagen": ("datagen", "--num-samples", "2", "--max-new-tokens", "4", "-o", "pairs"),
    "phase1": ("train", "phase1", "--text", "text.txt", "--stage", "1a", "--epochs", "1", "-o", "phase1"),
    "lora": ("train", "lora", "--data", "rows.jsonl", *_TINY, "-o", "lora"),
    "eval lm": ("eval", "lm", "--mode", "think", "--num-samples", "2", "--max-new-tokens", "2"),
}


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


def make_foreign(folder: Path, marker: Path) -> Path:
    """Make the model in ``folder`` need a Python file that creates ``marker`` when it runs."""
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "foreign.ForeignConfig", "AutoModelForCausalLM": "foreign.ForeignForCausalLM"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "foreign", "auto_map": auto_map}))
    (folder / "foreign.py").write_text(_CODE.format(marker=str(marker)))
    return folder


@pytest.fixture
def foreign(tmp_path: Path, marker: Path) -> Path:
    write_rows(tmp_path / "rows.jsonl")
    (tmp_path / "text.txt").write_text("\n\n".join(f"{n}+{n}" for n in range(60)))
    # A unique name for each test, because transformers caches code by folder name.
    return make_foreign(write_language_model(tmp_path / f"model_{tmp_path.name}"), marker)


def run(*arguments: str | Path) -> Result:
    words = [*map(str, arguments), "--device", "cpu"]
    return CliRunner().invoke(main, words, input="y\n", prog_name="llm-trm")


@pytest.mark.parametrize("command", COMMANDS)
def test_code_of_a_model_runs_for_the_flag_alone(command: str, foreign: Path, marker: Path) -> None:
    refused = run(*COMMANDS[command], "--model", foreign)
    assert not marker.exists()
    assert refused.exit_code == 2 and refused.stderr.count("\n") == 1, refused.output
    assert f"model {foreign} comes with Python code" in refused.stderr
    assert "--trust-remote-code" in refused.stderr
    trusted = run(*COMMANDS[command], "--model", foreign, "--trust-remote-code")
    assert marker.exists() and trusted.exit_code == 0, trusted.output


def test_head_for_eval_phase2(foreign: Path, marker: Path) -> None:
    with pytest.raises(InputError, match="comes with Python code"):
        load_thinking_model(str(foreign))
    assert not marker.exists()
    assert load_thinking_model(str(foreign), trust_remote_code=True).hidden_size == 32 and marker.exists()


def test_plans_read_no_code(foreign: Path, marker: Path) -> None:
    result = CliRunner().invoke(main, ["env", "--plan", "--model", str(foreign)], input="y\n")
    assert result.exit_code == 2 and "is not run for a plan" in result.stderr and not marker.exists()


def test_base_of_adapters(foreign: Path, marker: Path, tmp_path: Path) -> None:
    adapters = save(latent_model(), tmp_path / "adapters")
    base = tmp_path / f"base_{tmp_path.name}"
    shutil.copytree(Path(load_thinking_model("arithmetic").model.name_or_path), base)
    facts = adapters / FACTS_FILE
    facts.write_text(json.dumps({**json.loads(facts.read_text()), "base": str(make_foreign(base, marker))}))
    refused = run("generate", "--checkpoint", adapters, "1+1", "--max-new-tokens", "2")
    assert refused.exit_code == 2 and "comes with Python code" in refused.stderr
    assert not marker.exists()
    trusted = run("generate", "--checkpoint", adapters, "1+1", "--trust-remote-code")
    assert marker.exists() and trusted.exit_code == 0, trusted.output
    marker.unlink()
    rewarded = (
        "train",
        "phase3",
        "--checkpoint",
        adapters,
        "-o",
        "phase3",
        "--steps",
        "1",
        "--eval-samples",
        "2",
    )
    sizes = ("--group-size", "2", "--batch-size", "2", "--max-new-tokens", "2")
    refused = run(*rewarded, *sizes)
    assert refused.exit_code == 2 and "comes with Python code" in refused.stderr
    assert not marker.exists()
    trusted = run(*rewarded, *sizes, "--trust-remote-code", "--overwrite")
    assert trusted.exit_code == 0, trusted.output
    # A complete model could not be loaded.
    whole = run("train", "lora", "--data", "rows.jsonl", "--model", foreign, "--merge", "--trust-remote-code")
    assert whole.exit_code == 2 and "without --merge and --no-lora" in whole.stderr


def test_modules_named_by_adapters(marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = save(latent_model(), tmp_path / "adapters")
    described = adapters / "adapter_config.json"
    named = {"megatron_config": {"a": 1}, "megatron_core": "megatron.core.foreign"}
    described.write_text(json.dumps({**json.loads(described.read_text()), **named}))
    package = tmp_path / "megatron" / "core"
    package.mkdir(parents=True)
    (package / "foreign.py").write_text(_CODE.format(marker=str(marker)))
    monkeypatch.syspath_prepend(tmp_path)
    refused = run("generate", "--checkpoint", adapters, "1+1")
    assert refused.exit_code == 2 and "Megatron adapters" in refused.stderr, refused.output
    assert not marker.exists()


def test_code_in_the_folder_of_our_model(marker: Path, tmp_path: Path) -> None:
    model = latent_model().merge_and_unload()
    model.tokenizer = load_thinking_model("arithmetic").tokenizer
    whole = tmp_path / f"whole_{tmp_path.name}"
    save_latent_model(model, model.tokenizer, whole, base="arithmetic", prompt_form="chat")
    config = json.loads((whole / "config.json").read_text())
    for part in (config, config["text_config"]):
        part["auto_map"] = {"AutoConfig": "foreign.ForeignConfig", "AutoModel": "foreign.ForeignForCausalLM"}
    (whole / "config.json").write_text(json.dumps(config))
    (whole / "foreign.py").write_text(_CODE.format(marker=str(marker)))
    (whole / "custom_generate").mkdir()
    (whole / "custom_generate" / "generate.py").write_text(_CODE.format(marker=str(marker)))
    assert load_latent_model(whole).model.config.think_token_id is not None
    assert not marker.exists()


def test_scripts_of_data_sets(marker: Path) -> None:
    script = Path("owner/name/name.py")
    script.parent.mkdir(parents=True)
    script.write_text(_CODE.format(marker=str(marker)))
    with pytest.raises(InputError, match="cannot be loaded"):
        load_solved("owner/name")
    assert not marker.exists()


#: Kernels on the hub in config.json, as transformers reads them.
KERNELS: list[dict[str, Any]] = [
    {"attn_implementation": "evil/kernel"},
    {"_attn_implementation": "evil/kernel@v1:attend"},
    {"_attn_implementation_internal": "paged|evil/kernel"},
    {"attn_implementation": {"": "sdpa", "text_config": "evil/kernel"}},
    {"text_config": {"_attn_implementation": "evil/kernel"}},
    {"experts_implementation": "evil/kernel"},
]


def changed(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


@pytest.mark.parametrize("entries", KERNELS)
def test_kernels_of_the_hub(entries: dict[str, Any], tmp_path: Path) -> None:
    folder = write_language_model(tmp_path / "lm")
    changed(folder / "config.json", **entries)
    refused = run("generate", "1+1", "--model", folder)
    assert refused.exit_code == 2 and refused.stderr.count("\n") == 1, refused.output
    assert f"model {folder}: config.json: " in refused.stderr and "--trust-remote-code" in refused.stderr
    assert "evil/kernel" in refused.stderr


def test_kernels_named_in_other_files(tmp_path: Path) -> None:
    adapters = save(latent_model(), tmp_path / "adapters")
    settings = json.loads((adapters / FACTS_FILE).read_text())["settings"]
    changed(adapters / FACTS_FILE, settings={**settings, "attn_implementation": "evil/kernel"})
    with pytest.raises(InputError, match=r"latent\.json: settings: attn_implementation 'evil/kernel'"):
        load_latent_model(adapters)
    folder = write_language_model(tmp_path / "lm")
    changed(folder / "generation_config.json", attn_implementation="evil/kernel")
    with pytest.raises(InputError, match=r"generation_config\.json: attn_implementation 'evil/kernel'"):
        load_thinking_model(str(folder))


@pytest.mark.parametrize(
    "entries",
    [
        {"penalty_alpha": 0.6, "top_k": 4},
        {"num_beam_groups": 2, "num_beams": 2},
        {"custom_generate": "evil/generate"},
        {"dola_layers": "high"},
        {"force_words_ids": [[3]]},
    ],
)
def test_decoding_of_the_hub(
    entries: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetched(*arguments: Any, **options: Any) -> Any:
        raise AssertionError(f"code of the hub: {arguments}")

    monkeypatch.setattr(GenerationMixin, "load_custom_generate", fetched)
    folder = write_language_model(tmp_path / "lm")
    changed(folder / "generation_config.json", **entries)
    result = run("generate", "1+1", "--model", folder, "--max-new-tokens", "2")
    assert result.exit_code == 0, result.output
    loaded = load_thinking_model(str(folder)).model
    assert getattr(loaded.generation_config, next(iter(entries)), None) is None


@pytest.mark.parametrize("trusted", [(), ("--trust-remote-code",)])
@pytest.mark.parametrize(
    ("entries", "package"),
    [
        ({"attn_implementation": "flash_attention_2"}, "flash_attn"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "optimum"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "gptqmodel"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
    ],
)
def test_missing_packages(
    entries: dict[str, Any], package: str, trusted: tuple[str, ...], tmp_path: Path
) -> None:
    folder = write_language_model(tmp_path / "lm")
    changed(folder / "config.json", **entries)
    refused = run("generate", "1+1", "--model", folder, *trusted)
    assert refused.exit_code == 2 and refused.stderr.count("\n") == 1, refused.output
    assert f"model {folder} needs a package that is not installed" in refused.stderr, refused.stderr
    assert package in refused.stderr.lower().replace("flashattention2", "flash_attn")


def test_our_own_code_that_does_not_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ImportError("PuzzleTRM does not support", name="llm_trm.models.gone")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", broken)
    with pytest.raises(ImportError, match="PuzzleTRM does not support"):
        load_thinking_model("arithmetic")
