"""Tests of memory plans against real models."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch.profiler import ProfilerActivity, profile

from llm_trm.cli import main
from llm_trm.errors import InputError
from llm_trm.models.causal import TRMConfig, add_lora
from llm_trm.models.causal.plan import SMOLLM3, PlanSettings, cache_bytes, decoder_config, make_plan
from tests.causal.tiny import KINDS, REASONERS, THINK, tiny_decoder, tiny_trm

#: Maximum factor between the estimated and allocated activations, in either direction.
FACTOR = 1.5


def count(model: Any, trained: bool = False) -> int:
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad or not trained)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reasoner", REASONERS)
def test_parameters_equal_the_models(kind: str, reasoner: str) -> None:
    decoder = tiny_decoder(kind, tie_word_embeddings=kind == "smollm3")
    model = tiny_trm(reasoner=reasoner, decoder=decoder)
    plan = make_plan(model.config, PlanSettings(16, lora_r=3))
    plain = make_plan(model.config, PlanSettings(16, lora_r=0))
    still = make_plan(model.config, PlanSettings(16, lora_r=0, training=False, dtype=torch.float16))
    assert plan.language_model == count(decoder)
    assert sum(plan.reasoner.values()) == count(model.model.reasoner)
    assert all(plan.reasoner.values())
    assert plain.trained == count(model.model.reasoner) and plain.copied == plain.adapters == 0
    assert still.weights == 2 * count(model) and still.trained == still.optimizer == 0
    adapted = add_lora(model, r=3)
    assert plan.trained == count(adapted, trained=True)
    assert plan.language_model + 2 * sum(plan.reasoner.values()) + plan.adapters == count(adapted)
    assert plan.weights == 2 * plan.language_model + 4 * (count(adapted) - plan.language_model)
    assert plan.gradients == 4 * plan.trained and plan.optimizer == 8 * plan.trained
    silent = tiny_trm(decoder=tiny_decoder(kind), halting_loss_weight=0.0)
    assert make_plan(silent.config, PlanSettings(16, lora_r=0)).trained == count(
        silent.model.reasoner, trained=True
    )


@pytest.mark.parametrize("kind", [*KINDS, "mistral"])
def test_keys_and_values_are_those_of_a_cache(kind: str) -> None:
    settings = {"sliding_window": 6} if kind == "mistral" else {}
    model = tiny_trm(decoder=tiny_decoder(kind, **settings))
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, THINK]])
    with torch.no_grad():
        cache = model(input_ids=ids).past_key_values
    held = sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
    plan = make_plan(model.config, PlanSettings(8, dtype=torch.float32, training=False))
    assert plan.keys_and_values == held == cache_bytes(model.config.text_config, 1, 11, 4)
    assert plan.states == sum(states.nbytes for states in cache.past.states)
    assert make_plan(model.config, PlanSettings(8)).keys_and_values == 0


def allocated(run: Any) -> int:
    """Peak memory of ``run`` in bytes, above the memory in use before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    assert most
    return most


def sizeable(reasoner: str, **sizes: Any) -> Any:
    decoder = tiny_decoder(
        hidden_size=64, intermediate_size=192, vocab_size=300, max_position_embeddings=2048, **sizes
    )
    return tiny_trm(decoder=decoder, reasoner=reasoner, num_latents=16, d_compressed=32)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora_r", [0, 4])
@pytest.mark.parametrize("reasoner", REASONERS)
def test_activations_of_training(reasoner: str, lora_r: int, checkpointing: bool) -> None:
    model: Any = sizeable(reasoner, num_hidden_layers=4)
    config = model.config
    model.requires_grad_(False)
    model.model.reasoner.requires_grad_(True)
    if lora_r:
        model = add_lora(model, r=lora_r)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.randint(32, 300, (2, 256))
    ids[:, -8] = THINK
    run = lambda: model(input_ids=ids, labels=ids).loss.backward()  # noqa: E731
    found = allocated(run)
    plan = make_plan(
        config,
        PlanSettings(256, 2, torch.float32, lora_r=lora_r, gradient_checkpointing=checkpointing),
    )
    planned = plan.activations + plan.gradients
    assert found / FACTOR < planned < found * FACTOR, planned / found


@pytest.mark.parametrize("reasoner", REASONERS)
def test_activations_of_generation(reasoner: str) -> None:
    model = sizeable(reasoner)
    ids = torch.randint(32, 300, (2, 1500))
    ids[:, -1] = THINK
    mask = torch.ones_like(ids)
    mask[0, :5] = 0

    @torch.no_grad()
    def run() -> None:
        model(input_ids=ids, attention_mask=mask, logits_to_keep=1)

    found = allocated(run)
    plan = make_plan(model.config, PlanSettings(1500, 2, torch.float32, training=False))
    planned = plan.activations + plan.keys_and_values + plan.states
    assert found / FACTOR < planned < found * FACTOR, planned / found


def plan_of(*options: str) -> dict[str, Any]:
    done = CliRunner().invoke(main, ["env", "--plan", "--json", *options])
    assert done.exit_code == 0, done.output
    return json.loads(done.output)


def test_smollm3_is_known_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = decoder_config(SMOLLM3)
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    assert [getattr(config, name) for name in sizes] == [2048, 36, 16, 4]
    assert (config.intermediate_size, config.vocab_size) == (11008, 128256)
    assert config.max_position_embeddings == 65536 and config.tie_word_embeddings
    found = plan_of("--inference", "--context", "65280", "--num-latents", "256")
    assert found["parameters"]["language model"] == 3_075_098_624
    # Keys and values (2) of 36 layers, 65,536 columns, and 4 heads of 128 elements, two bytes each.
    assert found["bytes"]["keys and values"] == 2 * 36 * 65536 * 4 * 128 * 2
    assert found["bytes"]["optimizer"] == 0
    parts = [size for name, size in found["bytes"].items() if name != "total"]
    assert found["bytes"]["total"] == sum(parts)


def test_command_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a small GPU")
    properties = type("Properties", (), {"total_memory": 2**30})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    arithmetic = [
        "--model",
        "arithmetic",
        "--reasoner",
        "sequence",
        "--d-compressed",
        "32",
        "--context",
        "64",
    ]
    done = CliRunner().invoke(main, ["env", "--plan", *arithmetic])
    assert done.exit_code == 0, done.output
    assert "fits into the 1.0 GiB of a small GPU" in done.output and "(estimate)" in done.output
    done = CliRunner().invoke(main, ["env", "--plan"])
    assert "does not fit into the 1.0 GiB of a small GPU" in done.output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--context", "70000"], "70000 tokens do not fit the decoder's context of 65536"),
        (["--model", "/nowhere"], "model /nowhere cannot be loaded"),
        (["--model", "arithmetic", "--reasoner", "sequence"], "d_compressed must be below"),
        (["--model", "arithmetic", "--num-latents", "9999"], "soft tokens do not fit"),
    ],
)
def test_refusals(options: list[str], said: str) -> None:
    done = CliRunner().invoke(main, ["env", "--plan", *options])
    assert done.exit_code == 2 and said in done.output and done.output.count("\n") == 1


def test_options_of_a_plan_need_one() -> None:
    done = CliRunner().invoke(main, ["env", "--lora-r", "8"])
    assert done.exit_code == 2 and "--lora-r applies only to a plan: add --plan" in done.output
    with pytest.raises(InputError, match="at least 1"):
        PlanSettings(0)
    with pytest.raises(InputError, match="do not fit"):
        make_plan(TRMConfig({"model_type": "llama", "max_position_embeddings": 512}), PlanSettings(513))
