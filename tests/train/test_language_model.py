"""Training the language model of the arithmetic world, at a size of seconds."""

import math

import pytest
import torch
from click.testing import CliRunner

from llm_trm.cli import main
from llm_trm.data.arithmetic import World
from llm_trm.evaluate.answers import answer_of
from llm_trm.models import tiny
from llm_trm.train.lm.config import LanguageModelConfig
from llm_trm.train.lm.train import Lessons, train_language_model

transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}


@pytest.fixture(autouse=True)
def small_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiny.PRESETS, "tiny", SMALL)


def config(tmp_path, **settings) -> LanguageModelConfig:
    return LanguageModelConfig(
        tmp_path / "lm", world=World(1, 1), batch_size=16, **{"steps": 6, "save_every": 3} | settings
    )


def test_lessons_teach_only_what_the_model_writes(tmp_path) -> None:
    tokenizer = tiny.tiny_tokenizer()
    lessons = Lessons(config(tmp_path, steps=20), tokenizer)
    thinking = 0
    for index in range(200):
        lesson = lessons[index]
        said = [label for label in lesson["labels"] if label >= 0]
        assert lesson["input_ids"][-len(said) :] == said
        prompt, text = tokenizer.decode(lesson["input_ids"][: -len(said)]), tokenizer.decode(said)
        problem = World(1, 1).problem("train", 0, index)
        thinks = text.startswith(tiny.THINK)
        thinking += thinks
        expected = f"{tiny.THINK}{problem.thinking}{tiny.END_THINK}" if thinks else ""
        assert text == f"{expected}{problem.answer}{tiny.END}"
        assert prompt.endswith(tiny.ASSISTANT if thinks else f"{tiny.THINK}{tiny.END_THINK}")
    assert 90 < thinking < 150


def test_training_lowers_the_loss_and_saves_what_it_returns(tmp_path) -> None:
    model, tokenizer = train_language_model(config(tmp_path, steps=40, save_every=40, learning_rate=1e-2))
    lesson = Lessons(config(tmp_path), tokenizer)[500]
    ids, labels = (torch.tensor([lesson[name]]) for name in ("input_ids", "labels"))
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=labels).loss)
    assert loss < 0.8 * math.log(len(tokenizer))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "lm", dtype=torch.float32)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    assert loaded.config.use_cache


def test_resumed_training_ends_as_an_undisturbed_one(tmp_path) -> None:
    whole, _ = train_language_model(config(tmp_path / "whole"))
    train_language_model(config(tmp_path / "parts"))
    # What a run killed after its third step leaves behind.
    for left in (tmp_path / "parts" / "lm").iterdir():
        if left.is_file() and left.name != "lm.json":
            left.unlink()
        elif left.name == "checkpoint-6":
            for file in left.iterdir():
                file.unlink()
            left.rmdir()
    resumed, _ = train_language_model(config(tmp_path / "parts", resume=True))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])


def test_command_refuses_in_one_line(tmp_path) -> None:
    for arguments, words in ((["--resume"], "no checkpoint"), (["--modulus", "1"], "--modulus")):
        result = CliRunner().invoke(main, ["train", "lm", "-o", str(tmp_path / "lm"), *arguments])
        assert result.exit_code == 2
        assert result.stderr.startswith("llm-trm: error: ") and result.stderr.count("\n") == 1
        assert words in result.stderr


def test_answer_is_what_follows_the_trace() -> None:
    tokenizer = tiny.tiny_tokenizer()

    def answer(written: str, prompt: str = "") -> str:
        return answer_of(tokenizer, *(tokenizer.encode(text) for text in (prompt, written)))

    assert answer("<think>1+1=2</think>2") == "2"
    assert answer(" 7 ") == "7"
    assert answer("7", prompt="<think></think>") == "7"
    assert answer("1+1=2", prompt="<think>") == ""
