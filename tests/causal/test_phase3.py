"""Tests of GRPO on the recursion: TRL's trainer on tiny models."""

from __future__ import annotations

import functools
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")

from click.testing import CliRunner
from tokenizers.processors import TemplateProcessing

from llm_trm.cli.train.phase3 import phase3
from llm_trm.data.arithmetic import World
from llm_trm.data.lessons import lesson
from llm_trm.data.tags import THINK
from llm_trm.errors import InputError
from llm_trm.models.causal import TRMForCausalLM, add_lora
from llm_trm.models.causal.loading import load_latent_model, save_latent_model
from llm_trm.models.tiny import tiny_tokenizer
from llm_trm.train.phase3.arguments import grpo_arguments
from llm_trm.train.phase3.config import Phase3Config
from llm_trm.train.phase3.inputs import Problems, load_problems
from llm_trm.train.phase3.train import make_trainer, train_phase3
from llm_trm.train.phase3.trainer import LatentGRPOTrainer, active_reasoner
from llm_trm.train.run.report import Report
from tests.causal.tiny import tiny_decoder

TOKENIZER = tiny_tokenizer()
SETTINGS: dict[str, Any] = {
    "num_latents": 3,
    "soft_tokens": 3,
    "d_compressed": 16,
    "n_layers": 1,
    "n_heads": 4,
    "compression_heads": 4,
    "n_latent_steps": 2,
    "n_deep_recursions": 2,
    "supervision_steps": 2,
    # All randomness of training must be turned off.
    "dropout": 0.3,
}


def written(folder: Path, reasoner: str, adapters: bool) -> str:
    """Save a tiny model with a recursion in ``folder``, together with its language model."""
    base = folder / "base"
    decoder = tiny_decoder(
        "llama",
        vocab_size=len(TOKENIZER),
        pad_token_id=TOKENIZER.pad_token_id,
        eos_token_id=TOKENIZER.eos_token_id,
        bos_token_id=None,
        attention_dropout=0.3,
    )
    decoder.save_pretrained(base)
    TOKENIZER.save_pretrained(base)
    tags: Any = TOKENIZER.convert_tokens_to_ids([THINK, "</think>"])
    torch.manual_seed(2)
    model: Any = TRMForCausalLM.wrap(
        decoder, reasoner=reasoner, think_token_id=tags[0], end_think_token_id=tags[1], **SETTINGS
    )
    with torch.no_grad():
        model.model.reasoner.entry.projection.weight.mul_(3)
        if adapters:
            # As for a tokenizer without the tags: peft also wraps embeddings and output head.
            model = add_lora(model, r=2, dropout=0.3, tokens=tags)
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.3)
    save_latent_model(
        model, TOKENIZER, folder / "model", base=str(base), prompt_form="chat", known=1, held_out_loss=2
    )
    return str(folder / "model")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(tmp_path_factory.mktemp("whole"), "latents", adapters=False)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(tmp_path_factory.mktemp("adapted"), "sequence", adapters=True)


def config_of(checkpoint: str, output: Path, **settings: Any) -> Phase3Config:
    sizes: dict[str, Any] = {
        "world": World(1, 4),
        "group_size": 4,
        "batch_size": 8,
        "steps": 4,
        "learning_rate": 3e-3,
        "max_new_tokens": 5,
        "eval_samples": 6,
        "eval_every": 2,
        "log_every": 1,
        "save_every": 2,
    }
    return Phase3Config(checkpoint, output, **{**sizes, **settings})


def parity(*, completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """A reward that differs between random completions."""
    return [float(sum(ids) % 2) for ids in completion_ids]


def trainer_of(config: Phase3Config) -> LatentGRPOTrainer:
    latent = load_latent_model(config.checkpoint, trainable=True)
    trainer = make_trainer(config, grpo_arguments(config), latent, load_problems(config, 2))
    trainer.reward_funcs = [parity, trainer.reward_funcs[1]]
    trainer.model.train()
    return trainer


def batch_of(trainer: LatentGRPOTrainer) -> list[dict[str, Any]]:
    """Two problems with prompts of different lengths, four times each."""
    rows = sorted(trainer.train_dataset, key=lambda row: len(row["prompt"]))  # type: ignore[arg-type]
    return [dict(row) for row in (rows[0], rows[-1]) for _ in range(4)]


def snapshot(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("think", ["prompt", "model"])
@pytest.mark.parametrize("kind", ["whole", "adapted"])
def test_completions_are_scored_with_the_probabilities_they_were_sampled_with(
    kind: str, think: Any, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temperature = 0.7
    config = config_of(
        request.getfixturevalue(kind), tmp_path, think=think, temperature=temperature, max_new_tokens=12
    )
    trainer = trainer_of(config)
    model = trainer.model.double()
    drawn: dict[str, Tensor] = {}
    generate: Callable[..., Any] = model.generate

    def spy(**inputs: Any) -> Tensor:
        if think == "model":
            # A random model hardly ever writes the tag.
            bias = {(trainer._latent.config.think_token_id,): 4.0}
            inputs["generation_config"].sequence_bias = bias
        found = generate(**inputs, return_dict_in_generate=True, output_logits=True, output_scores=True)
        start = inputs["input_ids"].shape[1]
        drawn["ids"] = found.sequences[:, start:]
        drawn["logits"] = torch.stack(found.logits, dim=1)
        return found.sequences

    monkeypatch.setattr(model, "generate", spy)
    scored = trainer._generate_and_score_completions(batch_of(trainer))
    mask = scored["completion_mask"].bool()
    sampled = (drawn["logits"].float() / temperature).log_softmax(-1)
    sampled = sampled.gather(-1, drawn["ids"][..., None]).squeeze(-1)[mask]
    ids = torch.cat((scored["prompt_ids"], scored["completion_ids"]), dim=1)
    attention = torch.cat((scored["prompt_mask"], scored["completion_mask"]), dim=1)
    assert (scored["prompt_mask"] == 0).any()
    think_id: Any = trainer._latent.config.think_token_id
    assert (ids == think_id).any(1).sum() >= 3

    def score(scorer: Any) -> Tensor:
        keep = scored["completion_ids"].shape[1]
        return trainer._get_per_token_logps_and_entropies(scorer, ids, attention, keep)[0][mask].detach()

    # generate() only rounds its output to float32. In float32 the decoder's results with and without a cache
    # differ by 2.1e-4 (Zen 3).
    torch.testing.assert_close(score(model), sampled, atol=1e-5, rtol=0, check_dtype=False)
    with torch.no_grad():
        torch.testing.assert_close(score(model), sampled, atol=1e-5, rtol=0, check_dtype=False)
    assert (score(functools.partial(model, use_trm=False)) - sampled).abs().max() > 0.05


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["whole", "adapted"])
def test_a_training_step_of_trl_reaches_every_trained_tensor_and_no_frozen_one(
    kind: str, checkpointing: bool, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    config = config_of(request.getfixturevalue(kind), tmp_path, gradient_checkpointing=checkpointing)
    trainer = trainer_of(config)
    if checkpointing:
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    before = snapshot(trainer.model)
    trainer.current_gradient_accumulation_steps = 1
    trainer.training_step(trainer.model, batch_of(trainer), None)

    reasoner = active_reasoner(trainer.model)
    trained = {id(weight): name for name, weight in reasoner.named_parameters() if "halt_head" not in name}
    assert len(trained) > 10
    for name, weight in trainer.model.named_parameters():
        assert weight.requires_grad == (id(weight) in trained), name
        if weight.requires_grad:
            assert weight.grad is not None and weight.grad.abs().max() > 0, name
        else:
            assert weight.grad is None, name
    # A log-probability depends on the halting head only through the stopping step, so the head is unchanged.
    assert all(not weight.requires_grad for weight in reasoner.trm.halt_head.parameters())  # type: ignore[union-attr]
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_equal_rewards_change_nothing(kl: float, whole: str, tmp_path: Path) -> None:
    config = config_of(whole, tmp_path, format_weight=0.3, kl=kl, group_size=8)
    trainer = trainer_of(config)
    trainer.reward_funcs = [lambda completions, **_: [1.0] * len(completions)] * 2
    trainer.current_gradient_accumulation_steps = 1
    optimizer = trainer.create_optimizer()
    before = snapshot(trainer.model)
    trainer.training_step(trainer.model, batch_of(trainer), None)
    optimizer.step()
    # Only the rounding of model and reference differs. With AdamW's default epsilon of 1e-8, it could move
    # weights by more than half a step.
    allowed = 0.0 if kl == 0 else 0.05 * config.learning_rate
    for name, tensor in trainer.model.state_dict().items():
        assert (tensor - before[name]).abs().max() <= allowed, name


@pytest.mark.parametrize("kind", ["whole", "adapted"])
def test_a_decoder_in_bfloat16(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """As on a GPU: only the reasoner is float32, and peft keeps a copy of it that is not."""
    config = config_of(request.getfixturevalue(kind), tmp_path)
    latent = load_latent_model(config.checkpoint, dtype=torch.bfloat16, trainable=True)
    trainer = make_trainer(config, grpo_arguments(config), latent, load_problems(config, 2))
    trainer.model.train()
    trainer.reward_funcs = [parity, trainer.reward_funcs[1]]
    trainer.current_gradient_accumulation_steps = 1
    assert trainer.model.get_input_embeddings().weight.dtype == torch.bfloat16
    trainer.training_step(trainer.model, batch_of(trainer), None)
    for name, weight in active_reasoner(trainer.model).named_parameters():
        assert weight.dtype == torch.float32
        assert "halt_head" in name or (weight.grad is not None and weight.grad.isfinite().all()), name


def test_checkpointed_activations_give_the_same_gradient(adapted: str, tmp_path: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        trainer = trainer_of(config_of(adapted, tmp_path, gradient_checkpointing=checkpointing))
        if checkpointing:
            trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
        trainer.current_gradient_accumulation_steps = 1
        torch.manual_seed(3)
        trainer.training_step(trainer.model, batch_of(trainer), None)
        gradients.append(active_reasoner(trainer.model).entry.projection.weight.grad)  # type: ignore[union-attr]
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", ["whole", "adapted"])
def test_reference_is_the_initial_model(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    trainer = trainer_of(config_of(request.getfixturevalue(kind), tmp_path, kl=0.1))
    rows = batch_of(trainer)
    scored = trainer._generate_and_score_completions(rows)
    ids = torch.cat((scored["prompt_ids"], scored["completion_ids"]), dim=1)
    attention = torch.cat((scored["prompt_mask"], scored["completion_mask"]), dim=1)

    @torch.no_grad()
    def score(model: Any) -> Tensor:
        return trainer._get_per_token_logps_and_entropies(model, ids, attention, 5)[0]

    before = score(trainer.model)
    # Not bitwise, because the rounding of a product depends on the memory alignment of its operands.
    near = functools.partial(torch.testing.assert_close, atol=1e-5, rtol=0)
    near(scored["ref_per_token_logps"], before[:, -scored["completion_ids"].shape[1] :])
    near(score(trainer.ref_model), before)
    with torch.no_grad():
        for weight in active_reasoner(trainer.model).parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    near(score(trainer.ref_model), before)
    assert (score(trainer.model) - before).abs().max() > 0.05
    # Using it has no side effects: no other reasoner and no gradients for the adapters.
    trained = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert trained == trainer._trained and all("lora" not in name for name in trained)
    # The divergence limits the change of the model.
    trainer.current_gradient_accumulation_steps = 1
    inputs = trainer._prepare_inputs(rows)
    held = trainer._compute_loss(trainer.model, inputs)
    trainer.beta = 0.0
    assert held > trainer._compute_loss(trainer.model, inputs)


def test_without_divergence_there_is_no_reference(whole: str, tmp_path: Path) -> None:
    trainer = trainer_of(config_of(whole, tmp_path, kl=0.0))
    assert trainer.ref_model is None
    assert "ref_per_token_logps" not in trainer._generate_and_score_completions(batch_of(trainer))


def test_a_batch_without_a_thought_has_a_gradient_of_zero(whole: str, tmp_path: Path) -> None:
    trainer = trainer_of(config_of(whole, tmp_path, think="model"))
    trainer.current_gradient_accumulation_steps = 1
    think = trainer._latent.config.think_token_id
    trainer.generation_config.suppress_tokens = [think]
    trainer.training_step(trainer.model, batch_of(trainer), None)
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    assert all(weight.grad is not None and not weight.grad.any() for weight in weights)


def test_evaluation_is_greedy_and_counts_right_answers(
    adapted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(adapted, tmp_path, eval_samples=11)
    trainer = trainer_of(config)
    asked: list[list[int]] = []

    def constant(*, completion_ids: list[list[int]], answer: list[str], **_: Any) -> list[float | None]:
        asked.extend(completion_ids)
        return [1.0 if int(wanted) < 5 else 0.0 for wanted in answer]

    trainer.reward_funcs[0] = constant
    trainer.model.generation_config.repetition_penalty = 9.0
    found = trainer.evaluate()
    answers = [int(row["answer"]) for row in trainer.eval_dataset]
    assert found["eval_problems"] == 11
    assert found["eval_correct"] == sum(answer < 5 for answer in answers)
    assert found["eval_accuracy"] == pytest.approx(found["eval_correct"] / 11)
    assert trainer.model.training and trainer.generation_config.do_sample

    # One by one without TRL, which uses padded batches of 8 for 11 problems; the last batch is not full.
    latent = load_latent_model(adapted)
    for row, ids in zip(trainer.eval_dataset, asked, strict=False):
        prompt = TOKENIZER(row["prompt"], return_tensors="pt", add_special_tokens=False)
        alone = latent.model.generate(**prompt, max_new_tokens=5, do_sample=False)
        assert alone[0, prompt["input_ids"].shape[1] :].tolist() == ids
    assert found["eval_tokens"] == pytest.approx(sum(map(len, asked[:11])) / 11)


class Spy(Report):
    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.steps: list[int] = []

    def step(self, step: int) -> None:
        self.steps.append(step)

    def metrics(self, step: int, values: Any) -> None:
        self.records.append({"step": step, **values})

    def evaluated(self, record: Any) -> None:
        self.records.append(dict(record))


@pytest.mark.parametrize("kind", ["whole", "adapted"])
def test_resumed_run_equals_uninterrupted_run(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    checkpoint = request.getfixturevalue(kind)
    start = load_latent_model(checkpoint)
    config = config_of(checkpoint, tmp_path / "run", track="jsonl")
    spy = Spy()
    result = train_phase3(config, spy)
    assert spy.steps == [1, 2, 3, 4]
    assert [record["step"] for record in spy.records if "eval_accuracy" in record] == [0, 2, 4]
    assert [record["step"] for record in spy.records if "reward" in record] == [1, 2, 3, 4]
    assert all(record["kl"] >= 0 for record in spy.records if "kl" in record)
    assert result.before.total == result.after.total == 6
    lines = (config.output / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 2, 3, 4, 4]
    rows = [json.loads(line) for line in (config.output / "completions.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [step for step in (1, 2, 3, 4) for _ in range(8)]
    assert all(row["prompt"].endswith(THINK) and "advantage" in row for row in rows)
    assert all(row["correctness"] in (0.0, 1.0) and row["format"] in (0.0, 1.0) for row in rows)

    ended = load_latent_model(config.output)
    assert ended.has_adapters == start.has_adapters and ended.base == start.base
    assert "held_out_loss" not in ended.facts, "it belongs to other weights"
    assert ended.facts["known"] == 1 and ended.facts["phase3_accuracy_after"] == round(result.after.share, 4)
    assert ended.model.config.text_config.vocab_size == start.model.config.text_config.vocab_size
    assert (
        not (config.output / "README.md").exists() or "GRPO" not in (config.output / "README.md").read_text()
    )
    weights, old = snapshot(ended.model), snapshot(start.model)
    moved = {name for name, weight in weights.items() if not torch.equal(weight, old[name])}
    assert moved and all(".reasoner." in name and "halt_head" not in name for name in moved)

    # The same, from step 2 on.
    load_latent_model(config.output / "checkpoint-2")
    with (config.output / "completions.jsonl").open("a") as file:
        file.write('{"step": 4, "promp')
    for late in ("checkpoint-4", "latent.json"):
        path = config.output / late
        path.rename(tmp_path / late)
    again = train_phase3(replace(config, resume=True))
    assert again.before == result.before and again.after == result.after
    for name, weight in snapshot(load_latent_model(config.output).model).items():
        torch.testing.assert_close(weight, weights[name], atol=1e-5, rtol=0)
    repeated = [json.loads(line) for line in (config.output / "completions.jsonl").read_text().splitlines()]
    assert [(row["step"], row["completion"]) for row in repeated] == [
        (row["step"], row["completion"]) for row in rows
    ]
    lines = (config.output / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 2, 3, 4, 4]
    # The last update was done before; only what follows it is repeated.
    (config.output / "latent.json").unlink()
    spy = Spy()
    finished = train_phase3(replace(config, resume=True), spy)
    assert (finished.after, spy.steps) == (result.after, [])
    for name, weight in snapshot(load_latent_model(config.output).model).items():
        # The original copy that peft keeps is initialised again, but unused.
        assert "original_module" in name or torch.equal(weight, weights[name]), name
    with pytest.raises(InputError, match="seed was 0 and is 1"):
        train_phase3(replace(config, resume=True, seed=1))
    with pytest.raises(InputError, match="already contains a run"):
        train_phase3(config)
    with pytest.raises(InputError, match="choose one"):
        replace(config, resume=True, overwrite=True)


def test_run_resumes_only_with_its_own_problems(
    whole: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "problems.jsonl", ((f"{i}+1", str(i + 1)) for i in range(6)))
    monkeypatch.chdir(tmp_path)
    file = "problems.jsonl"
    # Two steps per epoch: the run ends within an epoch.
    config = config_of(whole, tmp_path / "run", data=file, eval_samples=2, steps=3, save_every=3)
    train_phase3(config)
    known = load_latent_model(config.output).facts["phase3"]["data"]
    assert known == str(tmp_path / file), "can be read from any directory"
    spy = Spy()
    train_phase3(replace(config, resume=True), spy)
    assert spy.steps == []
    write(Path(file), ((f"{i}+1", str(i + 1)) for i in range(1, 8)))
    with pytest.raises(InputError, match="no longer contains the problems that the run"):
        train_phase3(replace(config, resume=True))
    # A run that cannot start has replaced nothing.
    with pytest.raises(InputError, match="cannot be read"):
        train_phase3(replace(config, data="nothing.jsonl", overwrite=True))
    assert load_latent_model(config.output) and (config.output / "checkpoint-3").exists()


@pytest.mark.parametrize("wanted", [True, False])
def test_gradient_checkpointing_is_as_asked_for_without_a_warning(wanted: bool, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        arguments = grpo_arguments(config_of("none", tmp_path, gradient_checkpointing=wanted))
    assert arguments.gradient_checkpointing is wanted


def test_rewarded_answers_become_more_likely_on_held_out_problems(whole: str, tmp_path: Path) -> None:
    """From 37% to 68% when this was written."""
    config = config_of(whole, tmp_path, kl=0.0, group_size=16, batch_size=128, max_new_tokens=1, steps=12)
    trainer = trainer_of(config)

    def low(*, completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [float(ids[0] < 110) for ids in completion_ids]

    @torch.no_grad()
    def mass() -> float:
        prompts = trainer._tokenize_prompts([row["prompt"] for row in trainer.eval_dataset])[0]
        found = [trainer.model(torch.tensor([ids])).logits[0, -1].softmax(-1)[:110].sum() for ids in prompts]
        return float(sum(found)) / len(found)

    trainer.reward_funcs[0] = low
    before = mass()
    trainer.train()
    assert mass() > before + 0.15


def test_prompts_have_the_tokens_of_training(adapted: str, tmp_path: Path) -> None:
    trainer = trainer_of(config_of(adapted, tmp_path))
    tokenizer = trainer._tokenizer
    begin = ("<|user|>", tokenizer.convert_tokens_to_ids("<|user|>"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|user|> $A", special_tokens=[begin]
    )
    assert tokenizer("1")["input_ids"][0] == begin[1]
    question = (
        trainer.eval_dataset[0]["prompt"].removeprefix("<|user|>").removesuffix(f"<|assistant|>{THINK}")
    )
    taught = lesson(tokenizer, question, "7", "chat")
    asked = [id for id, label in zip(taught["input_ids"], taught["labels"], strict=True) if label == -100]
    found, _, _ = trainer._tokenize_prompts([trainer.eval_dataset[0]["prompt"]])
    assert found == [taught["input_ids"][: len(asked) + 1]]
    assert trainer._tokenize_prompts([trainer.eval_dataset[0]["prompt"].removesuffix(THINK)])[0] == [asked]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "gsm8k", "--operations", "3"], "--operations is for --data arithmetic"),
        (["--group-size", "1"], "group-size"),
    ],
)
def test_invalid_options(arguments: list[str], message: str, tmp_path: Path) -> None:
    found = CliRunner().invoke(phase3, [*arguments, "-o", str(tmp_path / "run")])
    assert found.exit_code == 2 and message in found.output


def test_default_model_is_not_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(phase3, [])
    assert isinstance(found.exception, InputError) and "there is no model in runs/lora" in str(
        found.exception
    )
    assert not list(tmp_path.iterdir())


def write(path: Path, rows: Iterator[tuple[str, str]]) -> str:
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows))
    return str(path)


def test_held_out_problems_are_not_trained_on(tmp_path: Path) -> None:
    rows = [(f"{i}+1", str(i + 1)) for i in range(20)]
    rows[3] = ("what is it", "first\nthen")
    rows[4] = rows[1]
    # Whitespace does not make it a different problem.
    rows[19] = (" 1+1\n", "2")
    file = write(tmp_path / "problems.jsonl", iter(rows))
    config = config_of("none", tmp_path, data=file, eval_samples=5, steps=100)
    found = load_problems(config, 2)
    assert [question.text for question in found.held_out] == ["0+1", "1+1", "2+1", "1+1"]
    assert [question.text for question in found.training] == [f"{i}+1" for i in range(5, 19)]
    assert found.dropped == 2
    few = load_problems(config_of("none", tmp_path, data=file, eval_samples=5, steps=3), 2)
    assert len(few.training) == 6
    with pytest.raises(InputError, match="a step needs 16"):
        load_problems(config, 16)
    world: Problems = load_problems(config_of("none", tmp_path), 2)
    assert len(world.training) == 8 and len(world.held_out) == 6
    assert not {q.text for q in world.training} & {q.text for q in world.held_out}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 6}, "is not a multiple of --group-size 4"),
        ({"group_size": 1}, "at least 2"),
        ({"resume": True}, "no checkpoint to resume"),
        ({"checkpoint": "no/such/model/here"}, "is not a folder"),
        ({"eval_samples": 1, "data": "nothing.jsonl"}, "cannot be read"),
    ],
)
def test_bad_input(settings: dict[str, Any], message: str, whole: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        train_phase3(replace(config_of(whole, tmp_path / "run"), **settings))


def test_replacing_a_folder_removes_the_older_model(whole: str, adapted: str, tmp_path: Path) -> None:
    config = config_of(whole, tmp_path / "run", steps=1, eval_samples=2, overwrite=True)
    shutil.copytree(adapted, config.output)
    train_phase3(config)
    assert not load_latent_model(config.output).has_adapters
    for name in ("latent.json", "checkpoint-1/trainer_state.json"):
        (config.output / name).unlink()
    # No complete model is left.
    again = replace(config, overwrite=False)
    with pytest.raises(InputError, match="no checkpoint to resume"):
        train_phase3(replace(again, resume=True))
    train_phase3(again)
    with pytest.raises(InputError, match="already contains a run"):
        train_phase3(again)


def test_the_model_to_train_is_not_written_over(whole: str) -> None:
    with pytest.raises(InputError, match="choose another folder"):
        train_phase3(config_of(whole, Path(whole), overwrite=True))
