"""Tests of ``llm-trm train lora``: runs of a few updates on a tiny model."""

from __future__ import annotations

import gc
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llm_trm.data.questions import load_solved
from llm_trm.errors import InputError
from llm_trm.models.causal.loading import load_latent_model
from llm_trm.models.compression import DimensionCompressor, save_compressor
from llm_trm.models.sequence_trm import SequenceTRM, save_sequence_trm
from llm_trm.train.lora import trainer
from llm_trm.train.lora.data import Collator, Lessons
from llm_trm.train.lora.distillation import state_distance, states_at, teacher_states, without_adapters
from llm_trm.train.lora.metrics import sample_measures, summary
from llm_trm.train.lora.model import build_trainee
from llm_trm.train.lora.report import LoraPlan
from llm_trm.train.lora.train import train_lora
from llm_trm.train.run.report import Report
from tests.causal.lora_world import settings, write_language_model, write_rows


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_language_model(folder / "lm")
    write_language_model(folder / "tied", thinks=False)
    write_language_model(folder / "untied", thinks=False, tied=False)
    write_rows(folder / "problems.jsonl")
    return folder


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """Speed up the Trainer's garbage collection at every start: 0.4 s with all modules imported here."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def batch(config: Any, trainee: Any, count: int = 8) -> dict[str, Tensor]:
    solved = load_solved(config.data)[:count]
    lessons = Lessons(solved, trainee.tokenizer, trainee.form, stages=1, teacher=True)
    return Collator(trainee.tokenizer.pad_token_id)([lessons[count + index] for index in range(count)])


def fed(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}


def weights(folder: Path) -> dict[str, Tensor]:
    name = "adapter_model.safetensors"
    return load_file(folder / (name if (folder / name).exists() else "model.safetensors"))


def logged(result: Any, name: str) -> list[float]:
    return [entry[name] for entry in result.history if name in entry]


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("reasoner", ["latents", "sequence"])
@pytest.mark.parametrize("language_model", ["lm", "tied", "untied"])
def test_exactly_the_trained_parameters_have_gradients(
    world: Path, lora: bool, reasoner: str, language_model: str
) -> None:
    config = settings(world, model=str(world / language_model), lora=lora, reasoner={"reasoner": reasoner})
    trainee = build_trainee(config)
    model = trainee.model.train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, and so is the gradient of lora_A
            torch.nn.init.normal_(parameter, std=0.1)
    model(**fed(batch(config, trainee))).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any(".reasoner." in f".{name}" for name in trained)
    assert lora == any("lora_A" in name for name in trained)
    for name, parameter in model.named_parameters():
        if name in trained:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name
    assert (language_model == "lm") == (not trainee.added)


def test_untrained_halting_head_stays_frozen(world: Path) -> None:
    model = build_trainee(settings(world, reasoner={"halting": "none"})).model
    for _ in range(2):
        heads = [weight for name, weight in model.named_parameters() if "halt_head" in name]
        assert heads and not any(weight.requires_grad for weight in heads)
        with without_adapters(model):
            pass


def test_run_lowers_the_loss_and_writes_metrics(world: Path, tmp_path: Path) -> None:
    config = settings(world, output=tmp_path / "run", steps=24, eval_every=4, learning_rate=2e-2, keep=2)
    result = train_lora(config)
    losses = logged(result, "eval_loss")
    assert min(losses) < 0.7 * losses[0] and len(losses) == 6
    assert logged(result, "loss")[-1] < 0.7 * logged(result, "loss")[0]
    best = sorted(range(6), key=lambda place: losses[place])
    kept = {int(path.name.rpartition("-")[2]) for path in config.output.glob("checkpoint-*")}
    assert kept == {4 * (place + 1) for place in best[:2]} | {24}
    assert result.best_step == 4 * (best[0] + 1)

    latent = load_latent_model(config.output)
    assert latent.base == config.model and latent.prompt_form == "chat"
    questions = sorted({row.question for row in load_solved(config.data)})
    random.Random(0).shuffle(questions)
    solved = {row.question: row for row in load_solved(config.data)}
    lessons = Lessons([solved[name] for name in questions[:8]], latent.tokenizer, latent.prompt_form)
    judged = Collator(latent.tokenizer.pad_token_id)([lessons[index] for index in range(8)])
    with torch.no_grad():
        outputs = latent.model(**fed(judged))
        measures = sample_measures(outputs, judged, latent.config.think_token_id)
        again = load_latent_model(config.output / f"checkpoint-{result.best_step}").model(**fed(judged))
    assert torch.equal(outputs.logits, again.logits)
    found = summary(measures.numpy())
    assert found["loss"] == pytest.approx(result.metrics["loss"], rel=1e-4)
    assert found["think_rate"] == result.metrics["think_rate"]


@pytest.mark.parametrize("use_lora", [True, False])
def test_the_best_model_is_written(
    world: Path, tmp_path: Path, use_lora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter((0.3, 0.1, 0.2, 0.4, 0.4))
    monkeypatch.setattr(trainer, "summary", lambda measures: {"loss": next(losses)})
    changes = {"output": tmp_path, "lora": use_lora, "eval_every": 1, "patience": 2, "steps": 5}
    result = train_lora(settings(world, **changes))
    assert result.best_step == 2 and result.metrics["loss"] == 0.1
    assert result.stopped_early and next(losses) == 0.4
    with pytest.raises(InputError, match="ended early, after 2 evaluations"):
        train_lora(settings(world, resume=True, **changes))
    best, last = (weights(tmp_path / f"checkpoint-{step}") for step in (result.best_step, 4))
    written = weights(tmp_path)
    assert written.keys() == best.keys()
    assert all(torch.equal(weight, best[name]) for name, weight in written.items())
    assert any(not torch.equal(weight, last[name]) for name, weight in written.items())


def test_merged_and_without_adapters(world: Path, tmp_path: Path) -> None:
    for name, changes in {"apart": {}, "merged": {"merge": True}, "bare": {"lora": False}}.items():
        train_lora(settings(world, output=tmp_path / name, **changes))
    ids = torch.tensor([[65, 66, 67, load_latent_model(tmp_path / "bare").config.think_token_id, 68]])
    logits = {}
    for name in ("apart", "merged", "bare"):
        model = load_latent_model(tmp_path / name).model
        assert getattr(model.config, "use_cache", True)
        with torch.no_grad():
            logits[name] = model(input_ids=ids).logits
    assert (tmp_path / "merged" / "model.safetensors").exists()
    torch.testing.assert_close(logits["merged"], logits["apart"], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits["bare"], logits["apart"], atol=1e-2)
    before, after = weights(world / "lm"), weights(tmp_path / "bare")
    # Without adapters the language model is unchanged.
    assert torch.equal(before["model.embed_tokens.weight"], after["model.decoder.embed_tokens.weight"])


@pytest.mark.parametrize(
    "changes",
    [
        {
            **{"accumulation": 2, "batch_size": 4, "curriculum": 2, "distill": 0.5},
            "reasoner": {"halting_loss_weight": 0.0},
        },
        {"lora": False, "reasoner": {"reasoner": "sequence", "dropout": 0.2, "halting": "none"}},
    ],
)
def test_resumed_training_ends_as_an_undisturbed_one(
    world: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    # With 38 training questions, the sixth update is in the second epoch.
    changes = {"steps": 8, "eval_every": 3, "track": "jsonl", **changes}
    whole = train_lora(settings(world, output=tmp_path / "whole", **changes))
    train_lora(settings(world, output=tmp_path / "parts", **changes))
    for path in (tmp_path / "parts").iterdir():
        if path.name in ("checkpoint-6", "checkpoint-8"):
            shutil.rmtree(path)
        elif path.is_file() and path.name not in ("lora.json", "metrics.jsonl"):
            path.unlink()
    # Incomplete checkpoints of a crash are skipped.
    (tmp_path / "parts" / "checkpoint-6").mkdir()
    resumed = train_lora(settings(world, output=tmp_path / "parts", resume=True, **changes))
    assert resumed.best_step == whole.best_step
    for name, weight in weights(tmp_path / "whole" / "checkpoint-8").items():
        assert torch.equal(weight, weights(tmp_path / "parts" / "checkpoint-8")[name]), name
    losses = [logged(run, "eval_loss") for run in (whole, resumed)]
    assert losses[0] == losses[1]
    lines = [
        (tmp_path / run / "metrics.jsonl").read_text().count('"eval_loss"') for run in ("whole", "parts")
    ]
    assert lines == [3, 3]
    with pytest.raises(InputError, match="seed was 0 and is 1"):
        train_lora(settings(world, output=tmp_path / "parts", resume=True, seed=1, **changes))


def test_finished_run_can_be_merged_later_and_elsewhere(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter((0.1, 0.2))
    monkeypatch.setattr(trainer, "summary", lambda measures: {"loss": next(losses)})
    changes = {"steps": 2, "eval_every": 1}
    train_lora(settings(world, output=tmp_path / "first", **changes))
    best = load_latent_model(tmp_path / "first" / "checkpoint-1")
    last = load_latent_model(tmp_path / "first" / "checkpoint-2")
    (tmp_path / "first").rename(tmp_path / "second")
    assert train_lora(settings(world, output=tmp_path / "second", resume=True, merge=True, **changes))
    merged = load_latent_model(tmp_path / "second")
    assert not merged.has_adapters
    ids = torch.tensor([[65, 66, 67, merged.config.think_token_id, 68]])
    with torch.no_grad():
        wanted, other, found = (model.model(input_ids=ids).logits for model in (best, last, merged))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, other, atol=1e-3)


class Heard(Report):
    def begin(self, plan: LoraPlan) -> None:
        self.plan = plan


def test_model_finds_its_questions_from_any_folder(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "data.jsonl")
    monkeypatch.chdir(tmp_path)
    train_lora(settings(world, output=tmp_path / "run", data="data.jsonl", steps=2))
    assert load_latent_model(tmp_path / "run").facts["data"] == str(tmp_path / "data.jsonl")


def test_held_out_data_is_not_trained_on(world: Path, tmp_path: Path) -> None:
    rows = [{"question": f"{n}+1", "answer": str(n + 1)} for n in range(12)]
    data = str(write_rows(tmp_path / "data.jsonl", [*rows, rows[3]]))
    val_data = write_rows(tmp_path / "val.jsonl", [{**row, "answer": "0"} for row in rows[2:5]])
    config = settings(world, output=tmp_path / "run", data=data, val_data=str(val_data), steps=2)
    heard = Heard()
    train_lora(config, heard)
    assert (heard.plan.training, heard.plan.held_out, heard.plan.shared) == (9, 3, 4)
    with pytest.raises(InputError, match="contains every question"):
        train_lora(settings(world, output=tmp_path / "no", data=data, val_data=data))
    blanks = write_rows(tmp_path / "blanks.jsonl", [{"question": " 2+1 ", "answer": "3"}, rows[4]])
    train_lora(settings(world, output=tmp_path / "two", data=data, val_data=str(blanks), steps=2), heard)
    assert (heard.plan.training, heard.plan.held_out, heard.plan.shared) == (11, 2, 2)
    # If the files change, held-out questions may have been trained on.
    for path in (Path(data), val_data):
        before = path.read_text()
        write_rows(path, rows[:4])
        with pytest.raises(InputError, match="no longer contains the questions that the run"):
            train_lora(replace(config, resume=True))
        path.write_text(before)
    train_lora(replace(config, resume=True))


def test_run_interrupted_early_starts_again(world: Path, tmp_path: Path) -> None:
    config = settings(world, output=tmp_path / "run", steps=1)
    half = config.output / "checkpoint-7"
    half.mkdir(parents=True)
    (config.output / "lora.json").write_text("{}")
    train_lora(config)
    assert not half.exists()
    # The old run is removed before the new one has any output.
    (config.output / "README.md").write_text("mine")
    with pytest.raises(InputError, match="every question"):
        train_lora(settings(world, output=config.output, overwrite=True, max_length=1))
    assert (config.output / "latent.json").exists()
    train_lora(settings(world, output=config.output, overwrite=True, steps=1, merge=True))
    names = {path.name for path in config.output.iterdir()}
    assert "adapter_config.json" not in names and "model.safetensors" in names
    assert (config.output / "README.md").read_text() == "mine"


def test_accumulated_batches_are_one_batch(world: Path, tmp_path: Path) -> None:
    # Lengths differ because of the written thinking. A mean of means would weight short answers more.
    norms = []
    for name, batch_size, accumulation in (("one", 8, 1), ("several", 2, 4)):
        config = settings(
            world,
            output=tmp_path / name,
            batch_size=batch_size,
            accumulation=accumulation,
            steps=1,
            curriculum=1,
            lora_dropout=0.0,
            reasoner={"halting_loss_weight": 0.0},
        )
        result = train_lora(config)
        norms.append((logged(result, "grad_norm")[0], logged(result, "loss")[0]))
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_gradient_checkpointing_changes_nothing(world: Path, tmp_path: Path) -> None:
    losses = []
    for name, changes in {"plain": {}, "again": {"gradient_checkpointing": True}}.items():
        config = settings(world, output=tmp_path / name, lora_dropout=0.0, **changes)
        losses.append(logged(train_lora(config), "loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_bfloat16(world: Path, tmp_path: Path) -> None:
    config = settings(world, output=tmp_path / "run", precision="bf16", steps=2)
    trainee = build_trainee(config)
    kinds = {name: parameter.dtype for name, parameter in trainee.model.named_parameters()}
    assert all(
        kind == (torch.float32 if ".reasoner." in name or "lora_" in name else torch.bfloat16)
        for name, kind in kinds.items()
    )
    result = train_lora(config)
    exact = train_lora(settings(world, output=tmp_path / "exact", steps=2))
    assert logged(result, "loss")[0] == pytest.approx(logged(exact, "loss")[0], rel=0.05)


@pytest.mark.parametrize("language_model", ["tied", "untied"])
@pytest.mark.parametrize("lora", [True, False])
def test_new_tokens_are_trained_and_kept(
    world: Path, tmp_path: Path, language_model: str, lora: bool
) -> None:
    config = settings(world, model=str(world / language_model), output=tmp_path / "run", lora=lora, steps=3)
    new = build_trainee(config)
    ids = new.tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    before = new.model.get_input_embeddings().weight.detach()
    train_lora(config)
    latent = load_latent_model(config.output)
    assert latent.prompt_form == "plain" and latent.tokenizer.encode("<think>") == ids[:1]
    for part in (latent.model.get_input_embeddings(), latent.model.get_output_embeddings()):
        after = part.weight.detach()
        # Only the output head learns </think>, and only if the data contains it; all data contains <think>.
        changed = (after[:-2] != before[:-2]).any(1) if part is latent.model.get_input_embeddings() else None
        assert changed is None or not changed.any()
    assert not torch.allclose(latent.model.get_input_embeddings().weight[ids[0]], before[ids[0]], atol=1e-4)
    head = load_latent_model(config.output).model.get_output_embeddings().weight
    assert torch.equal(head, latent.model.get_output_embeddings().weight)
    again = load_latent_model(config.output / "checkpoint-3").model
    probe = torch.tensor([[65, 66, ids[0], 67]])
    with torch.no_grad():
        assert torch.equal(again(input_ids=probe).logits.isfinite(), torch.ones(1, 4, head.shape[0]) > 0)


def test_the_teacher_is_the_language_model_with_written_thinking(world: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = settings(world, distill=1.0)
    trainee = build_trainee(config)
    model = trainee.model.train()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    taught = batch(config, trainee)
    wants = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    found = teacher_states(model, model, taught["teacher_ids"], taught["teacher_mask"], taught["teacher_at"])
    assert model.training
    assert wants == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    plain = AutoModelForCausalLM.from_pretrained(config.model)
    for row, (ids, at) in enumerate(zip(taught["teacher_ids"], taught["teacher_at"], strict=True)):
        with torch.no_grad():
            states = plain(input_ids=ids[None, : at + 1], output_hidden_states=True).hidden_states
        assert len(found) == 2
        for layer, expected in zip(found, states[1:], strict=True):
            torch.testing.assert_close(layer[row], expected[0, -1], rtol=1e-4, atol=1e-4)
        text = trainee.tokenizer.decode(ids[: at + 1])
        assert text.endswith("</think>") and "=" in text
    ours = [layer + 2 * layer.std() for layer in found]
    assert state_distance(ours, found).item() == pytest.approx(2, rel=1e-4)

    def distance() -> Tensor:
        states = model.eval()(**fed(taught), output_hidden_states=True).hidden_states
        return state_distance(states_at(states, taught["answer_at"]), found)

    before = distance()
    before.backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == (parameter.requires_grad and "halt" not in name), name
            if parameter.grad is not None:
                parameter.sub_(1e-3 * parameter.grad)
        assert distance() < before


def test_curriculum_and_distillation_change_the_training(world: Path, tmp_path: Path) -> None:
    runs = {}
    variants: dict[str, dict[str, Any]] = {
        "plain": {},
        "staged": {"curriculum": 2},
        "taught": {"distill": 2.0},
    }
    for name, changes in variants.items():
        changes = {"lora_dropout": 0.0, "learning_rate": 1e-3, "batch_size": 16, "eval_every": 4, **changes}
        runs[name] = train_lora(settings(world, output=tmp_path / name, **changes))
    first = {name: logged(run, "loss")[0] for name, run in runs.items()}
    assert abs(first["staged"] - first["plain"]) > 0.01
    distance = logged(runs["taught"], "distill_distance")
    assert first["taught"] == pytest.approx(first["plain"] + 2 * distance[0], rel=1e-4)
    assert len(distance) == 4
    assert not logged(runs["plain"], "distill_distance")
    # Evaluations never use written thinking.
    assert len({run.metrics["answer_loss"] for run in runs.values()}) == 3


def test_rows_with_and_without_thinking(world: Path, tmp_path: Path) -> None:
    rows = [
        {"question": f"{a}+{b}", "answer": "" if a == 3 else str(a + b)} for a in range(9) for b in (1, 2)
    ]
    for number, row in enumerate(rows):
        if number % 2:
            row["think"] = False  # type: ignore[assignment]
    data = write_rows(tmp_path / "mixed.jsonl", rows)
    for form in ("chat", "plain"):
        config = settings(world, data=str(data), output=tmp_path / form, prompt_form=form, batch_size=4)
        metrics = train_lora(config).metrics
        assert 0 <= metrics["think_rate"] <= 1 and 0 <= metrics["needless_think_rate"] <= 1
    plain = write_rows(tmp_path / "plain.jsonl", [{**row, "think": False} for row in rows])
    metrics = train_lora(settings(world, data=str(plain), output=tmp_path / "none")).metrics
    assert "think_rate" not in metrics and "trm_steps" not in metrics


def write_phase2(folder: Path, width: int) -> Path:
    torch.manual_seed(5)
    folder.mkdir(parents=True)
    facts = {"max_steps": 3, "halting": "none", "language_model": "somewhere"}
    save_sequence_trm(SequenceTRM(8, 1, 2, 2, 1), folder, **facts)
    save_compressor(DimensionCompressor(width, 8), folder / "compressor")
    return folder


def test_starts_from_phase2(world: Path, tmp_path: Path) -> None:
    started = build_trainee(settings(world, trm=write_phase2(tmp_path / "phase2", 32), reasoner={}))
    # Options take precedence over phase 2's settings.
    assert started.model.config.supervision_steps == 2 and started.model.config.d_compressed == 8
    found = load_file(tmp_path / "phase2" / "trm.safetensors")
    inside = dict(started.model.named_parameters())
    for name in ("reasoning_token", "output_norm.weight"):
        own = next(value for key, value in inside.items() if key.endswith(f"default.trm.{name}"))
        assert torch.equal(own, found[name])
    half = build_trainee(settings(world, trm=tmp_path / "phase2", reasoner={}, precision="bf16"))
    inside = dict(half.model.named_parameters())
    own = next(value for key, value in inside.items() if key.endswith("default.trm.reasoning_token"))
    assert torch.equal(own, found["reasoning_token"]), "must not be rounded"
    with pytest.raises(InputError, match="states of width 48"):
        build_trainee(settings(world, trm=write_phase2(tmp_path / "other", 48)))
    with pytest.raises(InputError, match="leave --reasoner latents out"):
        settings(world, trm=tmp_path, reasoner={"reasoner": "latents"})


@pytest.mark.parametrize(("asked", "share"), [(None, 0.1), (1e-2, 1.0), (3e-3, 0.3)])
def test_weights_from_phase2_have_their_own_learning_rate(
    asked: float | None, share: float, world: Path, tmp_path: Path
) -> None:
    config = settings(
        world,
        trm=write_phase2(tmp_path / "phase2", 32),
        trm_learning_rate=asked,
        reasoner={},
        lora=False,
        steps=2,
        output=tmp_path / "run",
    )
    train_lora(config)
    before = build_trainee(config).model.model.reasoner.state_dict()
    after = load_latent_model(config.output).model.model.reasoner.state_dict()

    def moved(name: str) -> float:
        return float((after[name] - before[name]).abs().max())

    # AdamW's first steps are as large as the learning rate.
    for name in ("compressor.compress.weight", "trm.reasoning_token", "trm.net.layers.0.mlp.0.weight"):
        assert moved(name) == pytest.approx(share * moved("entry.projection.weight"), rel=0.1), name


def test_refuses_in_one_line(world: Path, tmp_path: Path) -> None:
    def refused(words: str, **changes: Any) -> None:
        with pytest.raises(InputError, match=words) as caught:
            train_lora(settings(world, **{"output": tmp_path / "run", **changes}))
        assert "\n" not in str(caught.value)

    refused("longer than 5 tokens", max_length=5)
    refused("no checkpoint to resume", resume=True)
    refused("is for a sequence reasoner", reasoner={"soft_tokens": 2})
    refused("is for a latents reasoner", reasoner={"reasoner": "sequence", "num_latents": 2})
    refused("choose another folder", output=world / "lm", overwrite=True)
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "adapter_config.json").write_text("{}")
    refused("contains adapters, not a complete model", model=str(tmp_path / "adapters"))
    refused(
        "cannot be both trained on and held out",
        data=str(write_rows(tmp_path / "one.jsonl", [{"question": "1", "answer": "1"}])),
    )
    bare = write_rows(tmp_path / "bare.jsonl", [{"question": str(n), "answer": "1"} for n in range(5)])
    refused("no written thinking", data=str(bare), distill=1.0)
    refused("--track tensorboard needs tensorboard", track="tensorboard")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-5" / "trainer_state.json").touch()
    refused("already contains a run")
    (tmp_path / "run" / "lora.json").write_text("[1]")
    refused("lora.json does not contain a JSON object: start over", resume=True)
    long = [{"question": str(n), "answer": "1" * (200 if n % 2 else 1)} for n in range(12)]
    data = write_rows(tmp_path / "long.jsonl", long)
    assert train_lora(settings(world, data=str(data), output=tmp_path / "cut", steps=1)).metrics["step"] == 1
    refused(
        "every question with its answer is longer",
        data=str(write_rows(data, long[1::2])),
        output=tmp_path / "no",
    )
