"""Questions for a language model that recurs at ``<think>``, and what it is to write: tokens and labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

from llm_trm.data.reasoning import IGNORED
from llm_trm.errors import InputError
from llm_trm.models.tiny import END_THINK, THINK

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

#: How a question is put: as the user's turn of a chat, or as ``Question: ...``, a line break, ``Answer: ``.
PromptForm = Literal["chat", "plain"]


def prompt_form(tokenizer: PreTrainedTokenizerBase, form: PromptForm | None = None) -> PromptForm:
    """``form``, by default ``"chat"`` for a tokenizer with a chat template and ``"plain"`` for others.

    Raises:
        InputError: An unknown form, or ``"chat"`` without a template.
    """
    if form is None:
        return "chat" if tokenizer.chat_template else "plain"
    if form not in get_args(PromptForm):
        raise InputError(f"the prompt form must be one of {', '.join(get_args(PromptForm))}, not {form!r}")
    if form == "chat" and not tokenizer.chat_template:
        raise InputError("this tokenizer has no chat template: use the plain prompt form")
    return form


def question_prompt(
    tokenizer: PreTrainedTokenizerBase, question: str, form: PromptForm, *, thinking: bool = True
) -> str:
    """``question``, up to where the model begins to write.

    Args:
        tokenizer: The model's.
        question: What is asked.
        form: How it is put.
        thinking: Whether the model is to write ``<think>`` itself. A chat template closes the thinking that
            it leaves out; the plain form has nothing to say about it.
    """
    if form == "plain":
        return f"Question: {question}\nAnswer: "
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=thinking,
    )
    assert isinstance(text, str)
    return text


def response(tokenizer: PreTrainedTokenizerBase, answer: str, form: PromptForm, *, thinking: str = "") -> str:
    """What a model that recurs at ``<think>`` is to write: the tag, what is left of thinking, the answer."""
    tail = answer_tail(tokenizer, answer, form)
    if form == "plain":
        return f"{THINK} {thinking}{tail}" if thinking else f"{THINK}{tail}"
    return f"{THINK}{thinking}{END_THINK}{tail}"


def answer_tail(tokenizer: PreTrainedTokenizerBase, answer: str, form: PromptForm) -> str:
    """What of a :func:`response` stands behind its thinking."""
    return f"{' ' if form == 'plain' else ''}{answer}{tokenizer.eos_token or ''}"


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, form: PromptForm) -> list[int]:
    """Tokens of a :func:`question_prompt`; a chat template has written its special tokens itself."""
    ids: list[int] = tokenizer(prompt, add_special_tokens=form == "plain")["input_ids"]
    return ids


def lesson(
    tokenizer: PreTrainedTokenizerBase, question: str, answer: str, form: PromptForm, *, thinking: str = ""
) -> dict[str, list[int]]:
    """``input_ids`` of a question and its response, and ``labels``: -100 at the question."""
    asked = encode_prompt(tokenizer, question_prompt(tokenizer, question, form), form)
    written = response(tokenizer, answer, form, thinking=thinking)
    said: list[int] = tokenizer(written, add_special_tokens=False)["input_ids"]
    return {"input_ids": asked + said, "labels": [IGNORED] * len(asked) + said}


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], form: PromptForm
) -> BatchEncoding:
    """``input_ids`` and ``attention_mask`` of prompts, padded on the left: what ``generate`` takes."""
    return tokenizer.pad(
        {"input_ids": [encode_prompt(tokenizer, prompt, form) for prompt in prompts]},
        padding_side="left",
        return_tensors="pt",
    )
