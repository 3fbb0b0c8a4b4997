"""Determines how a tokenizer's chat template formats a question by rendering it, not by parsing it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llm_trm.data.passages import Passage, cached_per_tokenizer, joined, text
from llm_trm.data.tags import END_THINK, THINK
from llm_trm.errors import InputError, one_line
from llm_trm.ranges import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: A probe question with capitals and characters that a template might change or escape.
_PROBE = """Is 1 < 2 & "A" == 'b'?"""
_TAGS = re.compile(f"{re.escape(THINK)}|{re.escape(END_THINK)}")
_REMEDY = (
    "use a tokenizer whose chat template contains the user's message once and unchanged, or train without "
    "the template: `llm-trm train lora --prompt-form plain`"
)


@dataclass(frozen=True)
class Frame:
    """The text around a question in a prompt.

    Attributes:
        before, after: Text before and after the question; the latter ends with the generation prompt.
    """

    before: str
    after: str

    @property
    def opens(self) -> bool:
        """Whether a prompt ends in an open ``<think>``, ignoring whitespace."""
        return self.after.rstrip().endswith(THINK)

    @property
    def closes(self) -> bool:
        """Whether a prompt ends in ``</think>``, ignoring whitespace, so that the model cannot think."""
        return self.after.rstrip().endswith(END_THINK)


@dataclass(frozen=True)
class ChatTemplate:
    """The behaviour of a chat template.

    Attributes:
        whose: Description of the template for messages.
        thinking: The frame with ``enable_thinking=True``.
        silent: The frame with ``enable_thinking=False``.
    """

    whose: str
    thinking: Frame
    silent: Frame

    @property
    def opens(self) -> bool:
        """Whether a prompt for thinking opens the thought, so that the model must not write ``<think>``."""
        return self.thinking.opens

    @property
    def switches(self) -> bool:
        """Whether ``enable_thinking`` changes the prompt."""
        return self.thinking != self.silent

    @property
    def closing(self) -> str:
        """Text that closes an empty thought, if the template opens one even with thinking disabled."""
        if not self.silent.opens:
            return ""
        return f"\n{END_THINK}\n\n" if self.silent.after.endswith("\n") else END_THINK

    @property
    def silences(self) -> bool:
        """Whether a prompt for a direct answer keeps the model from thinking."""
        return self.switches or self.silent.opens or self.silent.closes

    def require_thinking(self) -> None:
        """Reject a template whose prompts for thinking do not let the model think.

        Raises:
            InputError: The prompts end in ``</think>``.
        """
        if self.thinking.closes:
            raise InputError(
                f"{self.whose} ends every prompt with {END_THINK}, even with enable_thinking: use a template "
                "that lets the model think"
            )


def chat_template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """The behaviour of the tokenizer's chat template.

    Raises:
        InputError: The template cannot be rendered, or omits, changes or repeats the question.
    """
    return _chat_template(tokenizer)


def chat_prompt(
    tokenizer: PreTrainedTokenizerBase, question: str, *, thinking: bool, recurs: bool
) -> Passage:
    """Render ``question`` as the user's turn, up to where the model starts to write.

    The question is encoded as text, even if it contains special tokens.

    Args:
        tokenizer: A tokenizer with a chat template.
        question: The question. Templates may strip whitespace around it.
        thinking: The template's ``enable_thinking``. If False, a thought that the template opens is closed.
        recurs: Whether the model recurs at every ``<think>``. If so, tags that the template mentions, as
            SmolLM3's does in its system prompt, are encoded as text.

    Raises:
        InputError: See :func:`chat_template`; also if the template changes this question.
    """
    template = chat_template(tokenizer)
    if thinking:
        template.require_thinking()
    rendered = _rendered(tokenizer, question, thinking)
    frame = template.thinking if thinking else template.silent
    asked = _question_in(rendered, frame, question)
    if asked is None:
        # A template may contain the date, which may have changed.
        frame = _frame(tokenizer, thinking)
        asked = _question_in(rendered, frame, question)
    if asked is None:
        raise InputError(
            f"{template.whose} changes the question {shown(question)}: reword the question, or {_REMEDY}"
        )
    if not thinking:
        return joined(frame.before, text(asked), frame.after, template.closing)
    if not recurs:
        return joined(frame.before, text(asked), frame.after)
    return joined(_without_tags(frame.before), text(asked), _without_tags(frame.after, frame.opens))


def rendered_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], where: str
) -> str:
    """Render a whole chat.

    Args:
        tokenizer: A tokenizer with a chat template.
        messages: The turns, as ``apply_chat_template`` takes them.
        where: Place of the chat for the error message, for instance a file and a line.

    Raises:
        InputError: The template rejects the chat, for instance a system message, roles that do not alternate,
            or content that is a list instead of a string.
    """
    return _applied(
        tokenizer,
        messages,
        f"{where}: {_whose(tokenizer)}",
        "change or remove the record, or use a model whose chat template accepts it",
    )


def _question_in(rendered: str, frame: Frame, question: str) -> str | None:
    """The question as it appears in a prompt with this frame; None if it does not."""
    ways = (question, question.strip(), question.rstrip(), question.lstrip())
    return next((asked for asked in ways if rendered == frame.before + asked + frame.after), None)


def _without_tags(part: str, opens: bool = False) -> Passage:
    """``part`` with thinking tags as text, except the last one if ``part`` ``opens`` a thought."""
    tags = [tag.span() for tag in _TAGS.finditer(part)]
    return Passage(part, tuple(tags[:-1] if opens else tags))


@cached_per_tokenizer
def _chat_template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    return ChatTemplate(_whose(tokenizer), _frame(tokenizer, True), _frame(tokenizer, False))


def _frame(tokenizer: PreTrainedTokenizerBase, thinking: bool) -> Frame:
    rendered = _rendered(tokenizer, _PROBE, thinking)
    times = rendered.count(_PROBE)
    if times != 1:
        fault = f"contains the question {times} times" if times else "omits or changes the question"
        raise InputError(f"{_whose(tokenizer)} {fault}: {_REMEDY}")
    before, _, after = rendered.partition(_PROBE)
    return Frame(before, after)


def _rendered(tokenizer: PreTrainedTokenizerBase, question: str, thinking: bool) -> str:
    options = {"add_generation_prompt": True, "enable_thinking": thinking}
    return _applied(tokenizer, [{"role": "user", "content": question}], _whose(tokenizer), _REMEDY, **options)


def _applied(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    whose: str,
    remedy: str,
    **options: Any,
) -> str:
    try:
        turns: Any = list(messages)  # transformers' hint knows only strings
        rendered = tokenizer.apply_chat_template(turns, tokenize=False, **options)
    # A template is a program, so rendering can raise any exception.
    except Exception as error:
        raise InputError(f"{whose} cannot be rendered ({one_line(error)}): {remedy}") from error
    assert isinstance(rendered, str)
    return rendered


def _whose(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"the chat template of {tokenizer.name_or_path}" if tokenizer.name_or_path else "the chat template"
