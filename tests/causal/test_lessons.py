"""Tests of prompts and training examples as tokens and labels."""

from __future__ import annotations

import pytest

from llm_trm.data.lessons import (
    encode_prompt,
    encode_prompts,
    lesson,
    prompt_form,
    question_prompt,
    response,
)
from llm_trm.data.reasoning import IGNORED
from llm_trm.errors import InputError
from llm_trm.models.tiny import tiny_tokenizer
from tests.causal.lora_world import plain_tokenizer


def test_the_form_is_the_tokenizers() -> None:
    assert prompt_form(tiny_tokenizer()) == "chat" and prompt_form(plain_tokenizer()) == "plain"
    assert prompt_form(tiny_tokenizer(), "plain") == "plain"
    with pytest.raises(InputError, match="no chat template"):
        prompt_form(plain_tokenizer(), "chat")
    with pytest.raises(InputError, match="must be one of chat, plain, not 'poem'"):
        prompt_form(tiny_tokenizer(), "poem")  # type: ignore[arg-type]


def test_prompts() -> None:
    tokenizer = tiny_tokenizer()
    assert question_prompt(tokenizer, "1+1?", "plain") == "Question: 1+1?\nAnswer: "
    asked = question_prompt(tokenizer, "1+1?", "chat")
    assert asked == "<|user|>1+1?<|assistant|>"
    assert question_prompt(tokenizer, "1+1?", "chat", thinking=False) == f"{asked}<think></think>"


@pytest.mark.parametrize(
    ("form", "thinking", "written"),
    [
        ("chat", "", "<think></think>2<|end|>"),
        ("chat", "1,2", "<think>1,2</think>2<|end|>"),
        ("plain", "", "<think> 2<|end|>"),
        ("plain", "1,2", "<think> 1,2 2<|end|>"),
    ],
)
def test_lessons_label_the_target(form: str, thinking: str, written: str) -> None:
    tokenizer = tiny_tokenizer()
    assert response(tokenizer, "2", form, thinking=thinking) == written  # type: ignore[arg-type]
    found = lesson(tokenizer, "1+1?", "2", form, thinking=thinking)  # type: ignore[arg-type]
    asked = encode_prompt(tokenizer, question_prompt(tokenizer, "1+1?", form), form)  # type: ignore[arg-type]
    ids, labels = found["input_ids"], found["labels"]
    assert ids[: len(asked)] == asked and labels[: len(asked)] == [IGNORED] * len(asked)
    assert ids[len(asked) :] == labels[len(asked) :]
    assert tokenizer.decode(labels[len(asked) :]) == written
    assert labels[len(asked)] == tokenizer.convert_tokens_to_ids("<think>")


@pytest.mark.parametrize("form", ["chat", "plain"])
def test_empty_questions_and_answers(form: str) -> None:
    tokenizer = tiny_tokenizer()
    labels = lesson(tokenizer, "", "", form)["labels"]  # type: ignore[arg-type]
    assert [label for label in labels if label != IGNORED][-1] == tokenizer.eos_token_id


def test_a_tokenizer_without_an_end_token() -> None:
    tokenizer = plain_tokenizer()
    tokenizer.eos_token = None
    assert response(tokenizer, "2", "plain") == "<think> 2"


def test_beginning_of_text_is_added_once() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|user|> $A", special_tokens=[("<|user|>", user)]
    )
    # A template already writes it; the plain form does not.
    for form in ("chat", "plain"):
        ids = lesson(tokenizer, "1?", "1", form)["input_ids"]  # type: ignore[arg-type]
        assert ids[0] == user and ids.count(user) == 1


def test_batches_are_padded_on_the_left() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "right"
    found = encode_prompts(tokenizer, ["1+1?", "1?"], "plain")
    assert found["input_ids"].shape == (2, 4)
    assert found["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert found["input_ids"][1, :2].tolist() == [tokenizer.pad_token_id] * 2
