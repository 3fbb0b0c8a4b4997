"""Prompts and training examples (tokens and labels) for a language model that recurs at ``<think>``."""

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
from llm_trm.ranges import shown

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase


def prompt_form(tokenizer: PreTrainedTokenizerBase, form: PromptForm | None = None) -> PromptForm:
    """Validate ``form``, which defaults to ``"chat"`` if the tokenizer has a chat template, else ``"plain"``.

    Raises:
        InputError: The form is unknown, or ``"chat"`` with a template that is missing or loses the question.
    """
    if form is None:
        form = "chat" if tokenizer.chat_template else "plain"
    if form not in get_args(PromptForm):
        raise InputError(
            f"the prompt form must be one of {', '.join(get_args(PromptForm))}, not {shown(form)}"
        )
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
    """The prompt for ``question``, up to where the model starts to write.

    The question is encoded as text, even if it contains special tokens.

    Args:
        tokenizer: The model's tokenizer.
        question: The question.
        form: Prompt form.
        thinking: Whether the model should think. If so, a chat template may open the thought itself
            (:func:`opens_thought`). If not, the template closes the thought or this function does. The plain
            form ignores this argument.
        recurs: Whether the model recurs at ``<think>``. If so, tags that a chat template mentions are
            encoded as text.

    Raises:
        InputError: The chat template loses or changes the question, or does not let the model think.
    """
    if form == "plain":
        return joined("Question: ", text(question), "\nAnswer: ")
    return chat_prompt(tokenizer, question, thinking=thinking, recurs=recurs)


def prompts_fingerprint(tokenizer: PreTrainedTokenizerBase, form: PromptForm) -> str:
    """SHA-256 of everything that determines a prompt's tokens, except the date in some chat templates."""
    determining = [
        form,
        tokenizer.chat_template if form == "chat" else surroundings(tokenizer)[0],
        sorted(control_tokens(tokenizer).items()),
        tokenizer.bos_token,
        encode(tokenizer, [f"Is 1 < 2?\n{THINK}"]),
    ]
    return hashlib.sha256(json.dumps(determining, sort_keys=True).encode()).hexdigest()


def opens_thought(tokenizer: PreTrainedTokenizerBase, form: PromptForm) -> bool:
    """Whether a prompt for thinking already ends in ``<think>``, so that the model does not write it."""
    return form == "chat" and chat_template(tokenizer).opens


def response(
    tokenizer: PreTrainedTokenizerBase, answer: str, form: PromptForm, *, thinking: str = ""
) -> Passage:
    """The target output of a model that recurs at ``<think>``: the tag, any written thinking, the answer.

    The tag is omitted if the prompt ends in it (:func:`opens_thought`). Thinking and answer are text.
    """
    tail = answer_tail(tokenizer, answer, form)
    if form == "plain":
        return joined(THINK, *((" ", text(thinking)) if thinking else ()), tail)
    opening = "" if opens_thought(tokenizer, form) else THINK
    return joined(opening, text(thinking), END_THINK, tail)


def answer_tail(tokenizer: PreTrainedTokenizerBase, answer: str, form: PromptForm) -> Passage:
    """The part of a :func:`response` after its thinking."""
    return joined(" " if form == "plain" else "", answer_at_once(tokenizer, answer))


def answer_at_once(tokenizer: PreTrainedTokenizerBase, answer: str) -> Passage:
    """The target output of a model that does not think: the answer, which is text, and the end token."""
    return joined(text(answer), tokenizer.eos_token or "")


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, form: PromptForm) -> list[int]:
    """Encode a :func:`question_prompt`. In a plain ``str``, special tokens are parsed as such.

    A chat template writes the beginning-of-text token itself; the plain form gets the tokenizer's. The end
    token that some tokenizers add is always omitted.

    Raises:
        InputError: The question contains a token that the tokenizer cannot encode as text.
    """
    return encode_each(tokenizer, [prompt], form)[0]


def encode_each(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], form: PromptForm
) -> list[list[int]]:
    """Encode each prompt like :func:`encode_prompt`."""
    prefix = surroundings(tokenizer)[0] if form == "plain" else []
    return [prefix + ids for ids in encode(tokenizer, prompts)]


def lesson(
    tokenizer: PreTrainedTokenizerBase, question: str, answer: str, form: PromptForm, *, thinking: str = ""
) -> dict[str, list[int]]:
    """``input_ids`` of a question and its response, and ``labels``, which are -100 at the question."""
    prompt = encode_prompt(tokenizer, question_prompt(tokenizer, question, form), form)
    (target,) = encode(tokenizer, [response(tokenizer, answer, form, thinking=thinking)])
    return {"input_ids": prompt + target, "labels": [IGNORED] * len(prompt) + target}


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], form: PromptForm
) -> BatchEncoding:
    """``input_ids`` and ``attention_mask`` of prompts, padded on the left for ``generate``."""
    return tokenizer.pad(
        {"input_ids": encode_each(tokenizer, prompts, form)},
        padding_side="left",
        return_tensors="pt",
    )
