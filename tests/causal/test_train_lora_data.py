"""Tests of ``llm-trm train lora``: its data, their order, its metrics and its command line."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llm_trm.cli.train.lora import lora
from llm_trm.data.lessons import lesson
from llm_trm.data.questions import Solved, load_solved
from llm_trm.errors import InputError
from llm_trm.models.tiny import tiny_tokenizer
from llm_trm.train.lora.callbacks import FollowEpochs, KeepBest
from llm_trm.train.lora.curriculum import StagedOrder, thinking_left, thinking_steps
from llm_trm.train.lora.data import Collator, Lessons
from llm_trm.train.lora.metrics import sample_measures, summary
from llm_trm.train.run.trainer_checkpoints import complete_checkpoints
from tests.causal.lora_world import write_language_model, write_rows

GSM8K = {"question": "How many?", "answer": "2 + 3 = <<2+3=5>>5.\nThen 1,000.\n#### 1,000"}


def test_reads_questions(tmp_path: Path) -> None:
    rows = [
        {"question": "1+1", "thinking": "1+1=2", "answer": 2, "operations": 1},
        GSM8K,
        {"question": "2", "answer": "", "think": False},
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    found = load_solved(str(path))
    assert found == [
        Solved("1+1", "2", "1+1=2"),
        Solved("How many?", "1,000", "2 + 3 = <<2+3=5>>5.\nThen 1,000."),
        Solved("2", "", thinks=False),
    ]
    assert load_solved(str(path), whole_answers=True)[1] == Solved("How many?", GSM8K["answer"])
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert load_solved(str(tmp_path / "rows.json")) == found


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("", "rows.jsonl is empty"),
        ('{"question": "1"}', "line 1: no answer among the columns 'question'"),
        ('{"answer": "1"}', "line 1: no question among the columns 'answer'"),
        ('{"question": " ", "answer": "1"}', "line 1: the question is empty"),
        ('{"question": "1", "answer": ["2"]}', "'answer' is a list, not text"),
        ('{"question": "1", "answer": "2", "think": "no"}', "think is 'no': write true or false"),
        (
            '{"question": "1", "answer": "2", "thinking": ["a", "b"]}',
            "'thinking' is a list, not text",
        ),
        (
            '{"question": "1", "answer": "2", "reasoning": false}',
            "line 1: 'reasoning' is False, neither",
        ),
        ('{"question": "1", "answer": NaN}', "line 1: 'answer' is nan, neither text nor a finite number"),
        ('{"question": "1", "answer": true}', "line 1: 'answer' is True, neither text"),
        ('{"question": 1e400, "answer": "1"}', "line 1: 'question' is inf, neither text"),
        ("[1]", "line 1: not a JSON object"),
        ('{"question": ', "line 1: not JSON"),
    ],
)
def test_refuses_rows(tmp_path: Path, rows: str, words: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(rows)
    with pytest.raises(InputError, match=words):
        load_solved(str(path))


def test_refuses_names() -> None:
    with pytest.raises(InputError, match="neither a file that ends in"):
        load_solved("somewhere")
    with pytest.raises(InputError, match="humaneval has no answers"):
        load_solved("humaneval")
    with pytest.raises(InputError, match="cannot be read"):
        load_solved("nowhere.jsonl")


def test_steps_of_thinking() -> None:
    assert thinking_steps("1+1=2;2+3=5") == ["1+1=2;", "2+3=5"]
    assert thinking_steps("First; one.\nThen two.") == ["First; one.\n", "Then two."]
    assert thinking_steps("One is 1.5. Two is 2.") == ["One is 1.5. ", "Two is 2."]
    assert thinking_steps("") == []
    left = [thinking_left("a;b;c;d", stage, 3) for stage in range(4)]
    assert left == ["a;b;c;d", "b;c;d", "c;d", ""]


def test_order_covers_each_epoch_and_moves_through_the_stages() -> None:
    order = StagedOrder(10, 3, seed=4)
    order.epochs = 4
    seen: list[int] = []
    for epoch in range(4):
        order.set_epoch(epoch)
        keys = list(order)
        assert sorted(key % 10 for key in keys) == list(range(10))
        seen += [key // 10 for key in keys]
    # Three stages share the first half, and the last stage has the second half.
    assert seen == [0] * 7 + [1] * 7 + [2] * 6 + [3] * 20
    order.set_epoch(1)
    again = list(order)
    order.set_epoch(2)
    assert again != list(order) and len({key % 10 for key in again}) == 10
    assert {key // 10 for key in StagedOrder(10, 0, seed=4)} == {0}


def test_order_follows_the_training() -> None:
    order = StagedOrder(10, 3, seed=4)
    arguments, state = (
        SimpleNamespace(gradient_accumulation_steps=2),
        SimpleNamespace(max_steps=9, global_step=4),
    )
    # Five batches are three updates; the fourth batch is done.
    FollowEpochs(order).on_epoch_begin(arguments, state, None, train_dataloader=range(5))
    assert order.epoch == 1 and order.epochs == 3


@pytest.mark.parametrize("form", ["chat", "plain"])
def test_lessons(form: Any) -> None:
    tokenizer = tiny_tokenizer()
    solved = [
        Solved("1+1+2", "4", "1+1=2;2+2=4"),
        Solved("3", "", ""),
        Solved("5", "5", "5", thinks=False),
    ]
    lessons = Lessons(solved, tokenizer, form, stages=2, teacher=True)
    for stage, thinking in enumerate(("1+1=2;2+2=4", "2+2=4", "")):
        found = lessons[3 * stage]
        expected = lesson(tokenizer, "1+1+2", "4", form, thinking=thinking)
        assert {name: found[name] for name in expected} == expected
        tail = "4<|end|>" if form == "chat" else " 4<|end|>"
        assert tokenizer.decode(found["input_ids"][found["answer_at"] + 1 :]) == tail
        teacher = lesson(tokenizer, "1+1+2", "4", form, thinking=solved[0].thinking)["input_ids"]
        assert found["teacher_ids"] == teacher
        assert tokenizer.decode(teacher[found["teacher_at"] + 1 :]) == tail
    assert lessons[1]["teacher_ids"] == [] == lessons[2]["teacher_ids"]
    assert lessons[7]["input_ids"] == lesson(tokenizer, "3", "", form)["input_ids"]
    at_once = lessons[2]
    said = [label for label in at_once["labels"] if label != -100]
    assert tokenizer.decode(said) == "5<|end|>"
    assert at_once["answer_at"] == len(at_once["input_ids"]) - len(said) - 1
    assert [lessons.longest(index) for index in range(3)] == [
        max(len(lessons[index]["input_ids"]), len(lessons[index]["teacher_ids"])) for index in range(3)
    ]
    # A tokenizer whose words include the preceding space, like most, has another token for the bare answer.
    words = Tokenizer(models.WordLevel({"?": 0, "5": 1, "\u01205": 2, "\u0120": 3, "!": 4}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("!", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    spaced = Lessons([solved[2]], PreTrainedTokenizerFast(tokenizer_object=words, eos_token="!"), "plain")[0]
    assert spaced["labels"][-2:] == [1, 4] and spaced["answer_at"] == len(spaced["input_ids"]) - 3

    kept = lessons.kept([2, 0])
    assert kept[0] == lessons[2] and kept[3] == lessons[3] and len(kept) == 2

    batch = Collator(tokenizer.pad_token_id)([lessons[index] for index in range(3)])
    assert batch["taught"].tolist() == [0]
    assert batch["attention_mask"].sum(1).tolist() == [len(lessons[index]["input_ids"]) for index in range(3)]
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def test_measures() -> None:
    tokenizer = tiny_tokenizer()
    think = tokenizer.convert_tokens_to_ids("<think>")
    solved = [
        Solved("1", "17"),
        Solved("2", "18"),
        Solved("3", "5", thinks=False),
        Solved("4", "6", thinks=False),
    ]
    lessons = Lessons(solved, tokenizer, "chat")
    batch = Collator(tokenizer.pad_token_id)([lessons[index] for index in range(4)])
    following = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:].clamp(min=0)
    logits = 20 * F.one_hot(following, len(tokenizer)).float()
    # The second writes another token for <think> and a wrong digit; the fourth thinks unnecessarily.
    asked = [int((row != -100).nonzero()[0]) - 1 for row in batch["labels"]]
    logits[1, asked[1]] = 20 * F.one_hot(torch.tensor(65), len(tokenizer))
    logits[1, asked[1] + 3] = 20 * F.one_hot(torch.tensor(65), len(tokenizer))
    logits[3, asked[3]] = 20 * F.one_hot(torch.tensor(think), len(tokenizer))
    outputs = SimpleNamespace(
        logits=logits,
        trm_steps=torch.tensor([[2], [4], [0], [0]]),
        halting_loss=torch.tensor(0.5),
        reconstruction_error=torch.tensor(0.25),
    )
    found = summary(sample_measures(outputs, batch, think).numpy())
    assert found["think_rate"] == 0.5 and found["needless_think_rate"] == 0.5
    assert found["answer_accuracy"] == 0.5 and found["trm_steps"] == 3
    assert found["halting_loss"] == 0.5 and found["reconstruction_error"] == 0.25
    labels = batch["labels"][:, 1:]
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-5)
    wrong = F.cross_entropy(logits[1, asked[1]][None], torch.tensor([think])).item()
    assert found["think_loss"] == pytest.approx(wrong / 2, rel=1e-4)


def history(*losses: float) -> list[dict[str, float]]:
    return [{"step": 10 * (place + 1), "eval_loss": loss} for place, loss in enumerate(losses)]


def test_keeps_the_best_and_the_last(tmp_path: Path) -> None:
    losses = (0.5, 0.3, float("nan"), 0.4, 0.2, 0.6)
    for place in range(6):
        step = 10 * (place + 1)
        (tmp_path / f"checkpoint-{step}").mkdir()
        state = SimpleNamespace(
            is_world_process_zero=True, global_step=step, log_history=history(*losses[: place + 1])
        )
        KeepBest(3, 3, 0.0).on_save(SimpleNamespace(output_dir=tmp_path), state, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"checkpoint-{n}" for n in (20, 40, 50, 60)]
    assert complete_checkpoints(tmp_path) == []
    (tmp_path / "checkpoint-40" / "trainer_state.json").touch()
    (tmp_path / "checkpoint-50").rmdir()
    assert complete_checkpoints(tmp_path) == [tmp_path / "checkpoint-40"]


def test_stops_after_evaluations_without_a_lower_loss() -> None:
    keeper = KeepBest(3, 3, 0.0)
    assert not keeper.exhausted(history(0.5, 0.6, 0.6), 100)
    assert keeper.exhausted(history(0.5, 0.6, 0.6, 0.5), 100)
    assert not keeper.exhausted(history(0.5, 0.6, 0.6, 0.4), 100)
    assert not KeepBest(3, 0, 0.0).exhausted(history(*range(9)), 100)
    # Evaluations before the curriculum's last stage do not count.
    assert not KeepBest(3, 3, 0.5).exhausted(history(0.1, 0.5, 0.6, 0.6, 0.6, 0.7, 0.7), 100)
    assert KeepBest(3, 3, 0.5).exhausted(history(0.1, 0.5, 0.6, 0.6, 0.6, 0.7, 0.7, 0.7), 100)
    control = SimpleNamespace(should_training_stop=False)
    state = SimpleNamespace(log_history=history(0.5, 0.6, 0.6, 0.5), max_steps=100)
    keeper.on_evaluate(None, state, control)
    assert control.should_training_stop and keeper.stopped


def test_command(tmp_path: Path) -> None:
    write_language_model(tmp_path / "lm")
    data = write_rows(tmp_path / "problems.jsonl")
    common = [
        "--model",
        str(tmp_path / "lm"),
        "--data",
        str(data),
        "-o",
        str(tmp_path / "run"),
        "--device",
        "cpu",
    ]
    sizes = ["--supervision-steps", "1", "-T", "1", "-n", "1", "--steps", "2"]
    latents = ["--num-latents", "3", "--track", "jsonl"]
    result = CliRunner().invoke(lora, [*common, *sizes, *latents], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "latents (3 latents; 1 latent steps, 1 deep recursions, 1 supervision steps)" in result.output
    assert "update 2/2  held out: loss" in result.output and "writes <think>" in result.output
    advice = f"Next: llm-trm eval lm --checkpoint {tmp_path / 'run'} --data FILE (questions that it"
    assert advice in result.output and str(data) not in result.output
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"curves.png", "lora.json", "latent.json", "metrics.jsonl", "checkpoint-2"} <= written
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("eval_think_rate" in line for line in lines)

    again = CliRunner().invoke(lora, [*common, *sizes])
    assert isinstance(again.exception, InputError) and "--overwrite" in str(again.exception)
    replaced = CliRunner().invoke(lora, [*common, *sizes, "--overwrite", "--reasoner", "sequence", "--merge"])
    assert replaced.exit_code == 0, replaced.output
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()
    assert "lost by compression" in replaced.output
