"""Questions for a language model that recurs at ``<think>``, and what it is to write: tokens and labels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

from llm_trm.choices import PromptForm
from llm_trm.data.passages import Passage, control_tokens, encode, joined, surroundings, text
from llm_trm.data.reasoning import IGNORED
from llm_trm.data.tags import END_THINK, THINK
from llm_trm.data.templates import chat_prompt, chat_template
from llm_trm.errors import InputError

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase


def prompt_form(tokenizer: PreTrainedTokenizerBase, form: PromptForm | None = None) -> PromptForm:
    """``form``, by default ``"chat"`` for a tokenizer with a chat template and ``"plain"`` for others.

    Raises:
        InputError: An unknown form, ``"chat"`` without a template, or with one that loses the question.
    """
    if form is None:
        form = "chat" if tokenizer.chat_template else "plain"
    if form not in get_args(PromptForm):
        raise InputError(f"the prompt form must be one of {', '.join(get_args(PromptForm))}, not {form!r}")
    if form == "chat":
        if not tokenizer.chat_template:
            raise InputError("this tokenizer has no chat template: use the plain prompt form")
        chat_template(tokenizer)
    return form


def question_prompt(
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    form: PromptForm,
    *,
    thinking: bool = True,
    recurs: bool = True,
) -> Passage:
    """``question``, up to where the model begins to write; it is text, whatever tokens it names.

    Args:
        tokenizer: The model's.
        question: What is asked.
        form: How it is put.
        thinking: Whether the model is to think. A chat template may open the thought itself
            (:func:`opens_thought`); if not, it closes it, or it is closed here. The plain form has nothing to
            say about it.
        recurs: Whether the model recurs at ``<think>``, so that what a chat template says about the tag must
            be text.

    Raises:
        InputError: The chat template loses or changes the question, or leaves nothing to think.
    """
    if form == "plain":
        return joined("Question: ", text(question), "\nAnswer: ")
    return chat_prompt(tokenizer, question, thinking=thinking, recurs=recurs)


def prompts_fingerprint(tokenizer: PreTrainedTokenizerBase, form: PromptForm) -> str:
    """Of what decides which tokens a question becomes, but for the date, which some chat templates write."""
    decides = [
        form,
        tokenizer.chat_template if form == "chat" else surroundings(tokenizer)[0],
        sorted(control_tokens(tokenizer).items()),
        tokenizer.bos_token,
        encode(tokenizer, [f"Is 1 < 2?\n{THINK}"]),
    ]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def opens_thought(tokenizer: PreTrainedTokenizerBase, form: PromptForm) -> bool:
    """Whether a prompt for thinking ends in ``<think>`` already, so that the model does not write it."""
    return form == "chat" and chat_template(tokenizer).opens


def response(
    tokenizer: PreTrainedTokenizerBase, answer: str, form: PromptForm, *, thinking: str = ""
) -> Passage:
    """What a model that recurs at ``<think>`` is to write: the tag, what is left of thinking, the answer.

    The tag is left out where the prompt ends in it (:func:`opens_thought`). Thinking and answer are text.
    """
    tail = answer_tail(tokenizer, answer, form)
    if form == "plain":
        return joined(THINK, *((" ", text(thinking)) if thinking else ()), tail)
    begun = "" if opens_thought(tokenizer, form) else THINK
    return joined(begun, text(thinking), END_THINK, tail)


def answer_tail(tokenizer: PreTrainedTokenizerBase, answer: str, form: PromptForm) -> Passage:
    """What of a :func:`response` stands behind its thinking."""
    return joined(" " if form == "plain" else "", answer_at_once(tokenizer, answer))


def answer_at_once(tokenizer: PreTrainedTokenizerBase, answer: str) -> Passage:
    """What a model is to write that does not think: the answer, which is text, and its end."""
    return joined(text(answer), tokenizer.eos_token or "")


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, form: PromptForm) -> list[int]:
    """Tokens of a :func:`question_prompt`; in any other string, tokens that it names are read as such.

    A chat template has written the token that begins a text itself; the plain form gets the tokenizer's.
    None gets the end token that some tokenizers add.

    Raises:
        InputError: The question names a token that the tokenizer cannot write out.
    """
    return encode_each(tokenizer, [prompt], form)[0]


def encode_each(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], form: PromptForm
) -> list[list[int]]:
    """Tokens of each prompt, as :func:`encode_prompt` gives them."""
    begun = surroundings(tokenizer)[0] if form == "plain" else []
    return [begun + ids for ids in encode(tokenizer, prompts)]


def lesson(
    tokenizer: PreTrainedTokenizerBase, question: str, answer: str, form: PromptForm, *, thinking: str = ""
) -> dict[str, list[int]]:
    """``input_ids`` of a question and its response, and ``labels``: -100 at the question."""
    asked = encode_prompt(tokenizer, question_prompt(tokenizer, question, form), form)
    written = response(tokenizer, answer, form, thinking=thinking)
    (said,) = encode(tokenizer, [written])
    return {"input_ids": asked + said, "labels": [IGNORED] * len(asked) + said}


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], form: PromptForm
) -> BatchEncoding:
    """``input_ids`` and ``attention_mask`` of prompts, padded on the left: what ``generate`` takes."""
    return tokenizer.pad(
        {"input_ids": encode_each(tokenizer, prompts, form)},
        padding_side="left",
        return_tensors="pt",
    )
