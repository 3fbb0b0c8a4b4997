"""Tests of rewards, called as TRL calls them."""

from __future__ import annotations

from typing import Any

import pytest

from llm_trm.models.tiny import END, tiny_tokenizer
from llm_trm.train.phase3.rewards import correctness_reward, format_reward

TOKENIZER = tiny_tokenizer()
IDS: Any = TOKENIZER.convert_tokens_to_ids(["<think>", "</think>"])
TAGS: tuple[int, int] = tuple(IDS)
ENDS = {TOKENIZER.eos_token_id}


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def correctness(form: Any, prompt: str, completions: list[str], answers: list[str]) -> list[float | None]:
    reward = correctness_reward(TOKENIZER, form, TAGS, ENDS)
    return reward(
        prompts=[prompt] * len(completions),
        completions=completions,
        completion_ids=[ids_of(text) for text in completions],
        answer=answers,
        log_metric=None,
    )


def format_of(form: Any, prompt: str, completion: str) -> float | None:
    """The format reward of one completion with its end token."""
    reward = format_reward(TOKENIZER, form, TAGS, ENDS)
    ids = ids_of(completion)
    return reward(prompts=[prompt], completions=["?"], completion_ids=[ids], answer=["1"])[0]


@pytest.mark.parametrize("prompt", ["<|assistant|><think>", "<|assistant|>"])
def test_correctness_reads_the_answer_after_thinking(prompt: str) -> None:
    cases = [
        (f"</think>1,000.0{END}", "1000", 1.0),
        (f"7</think>8{END}", "7", 0.0),
        (f"8</think>7{END}", "7", 1.0),
        (f"</think>{END}", "7", 0.0),
        (f"7{END}", "7", 0.0 if prompt.endswith("<think>") else 1.0),  # never closed, or never opened
        (f"</think>7<think>{END}", "7", 0.0),
        (f"</think>#### 7\n{END}", "so it is 7 #### 7", 1.0),
        ("</think>7", "7", 0.0),  # truncated: the answer might have been 72
    ]
    completions, answers, wanted = (list(column) for column in zip(*cases, strict=True))
    assert correctness("chat", prompt, completions, answers) == wanted


def test_correctness_of_plain_text() -> None:
    completions = [f" 7{END}", f"1 7{END}", f" 8{END}", " 7", " 7\nQuestion: 1+2"]
    wanted = [1.0, 1.0, 0.0, 0.0, 1.0]
    assert correctness("plain", "Answer: <think>", completions, ["7"] * 5) == wanted
    completions = [f"<think>{text}" for text in completions]
    assert correctness("plain", "Answer: ", completions, ["7"] * 5) == wanted
    # The answer to the model's own question does not count.
    assert correctness("plain", "Answer: ", [f"<think> 7\nQuestion: 1+2\nAnswer: 3{END}"], ["3"]) == [0.0]


def test_an_answer_that_cannot_be_graded_has_no_reward() -> None:
    assert correctness("chat", "<think>", ["</think>7"], ["first this\nthen that"]) == [None]


@pytest.mark.parametrize(
    ("completion", "wanted"),
    [
        (f"</think>6{END}", 1.0),
        (f"5+1=6</think>6{END}", 1.0),
        ("</think>6", 0.0),  # truncated
        (f"6{END}", 0.0),
        (f"</think>{END}", 0.0),
        (f"</think> {END}", 0.0),
        (f"<think></think>6{END}", 0.0),  # a second thought
        (f"</think></think>6{END}", 0.0),
        (END, 0.0),
    ],
)
def test_format_of_chats_whose_prompt_ends_in_think(completion: str, wanted: float) -> None:
    assert format_of("chat", "<|assistant|><think>", completion) == wanted
    given = completion.removeprefix("<think>")
    if given == completion:
        assert format_of("chat", "<|assistant|>", f"<think>{completion}") == wanted


def test_format_without_a_thought() -> None:
    assert format_of("chat", "<|assistant|>", f"</think>6{END}") == 0.0
    assert format_of("chat", "<|assistant|>", f"6<think></think>6{END}") == 0.0


@pytest.mark.parametrize(
    ("prompt", "completion", "wanted"),
    [
        ("Answer: <think>", f" 6{END}", 1.0),
        ("Answer: ", f"<think> 6{END}", 1.0),
        ("Answer: ", f"6{END}", 0.0),
        ("Answer: <think>", " 6", 0.0),
        ("Answer: <think>", f"</think>6{END}", 0.0),
        ("Answer: ", f"<think> {END}", 0.0),
    ],
)
def test_format_of_plain_text(prompt: str, completion: str, wanted: float) -> None:
    assert format_of("plain", prompt, completion) == wanted


def test_empty_completion_has_no_form() -> None:
    reward = format_reward(TOKENIZER, "chat", TAGS, ENDS)
    assert reward(prompts=["<think>"], completions=[""], completion_ids=[[]]) == [0.0]


def test_reward_names_match_trl_logs() -> None:
    rewards = [make(TOKENIZER, "chat", TAGS, ENDS) for make in (correctness_reward, format_reward)]
    assert [reward.__name__ for reward in rewards] == ["correctness", "format"]
