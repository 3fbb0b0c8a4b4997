"""What a tokenizer's chat template makes of a question: found out by rendering, not by reading it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_trm.data.passages import Passage, joined, remembered, text
from llm_trm.data.tags import END_THINK, THINK
from llm_trm.errors import InputError, one_line, shortened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Rendered to see what becomes of a question: in capitals too, and with what a template might escape.
_PROBE = """Is 1 < 2 & "A" == 'b'?"""
_TAGS = re.compile(f"{re.escape(THINK)}|{re.escape(END_THINK)}")
_REMEDY = (
    "give the tokenizer a chat template that holds the user's message once and as it is, or have "
    "`llm-trm train lora` do without it by --prompt-form plain"
)


@dataclass(frozen=True)
class Frame:
    """What stands around a question in a prompt.

    Attributes:
        before, behind: Text; the generation prompt ends the latter.
    """

    before: str
    behind: str

    @property
    def opens(self) -> bool:
        """Whether a prompt ends in an open ``<think>``, white space aside."""
        return self.behind.rstrip().endswith(THINK)

    @property
    def closes(self) -> bool:
        """Whether a prompt ends in ``</think>``, white space aside: nothing is left to think."""
        return self.behind.rstrip().endswith(END_THINK)


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template, as it renders.

    Attributes:
        whose: Its tokenizer, for messages.
        thinking: With ``enable_thinking=True``.
        silent: With ``enable_thinking=False``.
    """

    whose: str
    thinking: Frame
    silent: Frame

    @property
    def opens(self) -> bool:
        """Whether a prompt for thinking begins the thought: the model is not to write ``<think>`` again."""
        return self.thinking.opens

    @property
    def switches(self) -> bool:
        """Whether ``enable_thinking`` changes the prompt."""
        return self.thinking != self.silent

    @property
    def closing(self) -> str:
        """What closes the thought that a template opens though it was told not to: an empty one."""
        if not self.silent.opens:
            return ""
        return f"\n{END_THINK}\n\n" if self.silent.behind.endswith("\n") else END_THINK

    @property
    def silences(self) -> bool:
        """Whether a prompt for an answer at once keeps the model from thinking."""
        return self.switches or self.silent.opens or self.silent.closes

    def require_thinking(self) -> None:
        """Refuse a template whose prompts for thinking leave nothing to think.

        Raises:
            InputError: They end in ``</think>``.
        """
        if self.thinking.closes:
            raise InputError(
                f"{self.whose} ends every prompt in {END_THINK}, with enable_thinking too: use a template "
                "that lets the model think"
            )


def chat_template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """What the template of ``tokenizer`` does.

    Raises:
        InputError: It cannot be rendered, leaves the question out, changes it, or repeats it.
    """
    return _chat_template(tokenizer)


def chat_prompt(
    tokenizer: PreTrainedTokenizerBase, question: str, *, thinking: bool, recurs: bool
) -> Passage:
    """``question`` as the user's turn, up to where the model begins to write, as the template renders it.

    The question is text, whatever tokens it names.

    Args:
        tokenizer: With a chat template.
        question: What is asked; templates may strip white space around it.
        thinking: What the template gets as ``enable_thinking``; if not, a thought that it opens is closed.
        recurs: Whether the model that thinks recurs at every ``<think>``: what the template says about the
            tags, as SmolLM3's does in its system prompt, is text then.

    Raises:
        InputError: See :func:`chat_template`; or the template changes this question.
    """
    template = chat_template(tokenizer)
    if thinking:
        template.require_thinking()
    rendered = _rendered(tokenizer, question, thinking)
    frame = template.thinking if thinking else template.silent
    asked = _question_in(rendered, frame, question)
    if asked is None:
        # A template may write the date, which has changed since.
        frame = _frame(tokenizer, thinking)
        asked = _question_in(rendered, frame, question)
    if asked is None:
        raise InputError(
            f"{template.whose} does not render the question {shortened(question)} as it is: word it "
            f"otherwise, or {_REMEDY}"
        )
    if not thinking:
        return joined(frame.before, text(asked), frame.behind, template.closing)
    if not recurs:
        return joined(frame.before, text(asked), frame.behind)
    return joined(_without_tags(frame.before), text(asked), _without_tags(frame.behind, frame.opens))


def _question_in(rendered: str, frame: Frame, question: str) -> str | None:
    """The question as a prompt of this frame holds it, None if it does not."""
    ways = (question, question.strip(), question.rstrip(), question.lstrip())
    return next((asked for asked in ways if rendered == frame.before + asked + frame.behind), None)


def _without_tags(part: str, opens: bool = False) -> Passage:
    """``part`` with the tags of thinking as text, but for an opening one at the end if it ``opens``."""
    tags = [tag.span() for tag in _TAGS.finditer(part)]
    return Passage(part, tuple(tags[:-1] if opens else tags))


@remembered
def _chat_template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    return ChatTemplate(_whose(tokenizer), _frame(tokenizer, True), _frame(tokenizer, False))


def _frame(tokenizer: PreTrainedTokenizerBase, thinking: bool) -> Frame:
    rendered = _rendered(tokenizer, _PROBE, thinking)
    times = rendered.count(_PROBE)
    if times != 1:
        fault = f"holds the question {times} times" if times else "leaves the question out, or changes it"
        raise InputError(f"{_whose(tokenizer)} {fault}: {_REMEDY}")
    before, _, behind = rendered.partition(_PROBE)
    return Frame(before, behind)


def _rendered(tokenizer: PreTrainedTokenizerBase, question: str, thinking: bool) -> str:
    try:
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinking,
        )
    # A template is a program, and whatever goes wrong in it comes out here.
    except Exception as error:
        raise InputError(f"{_whose(tokenizer)} cannot be rendered ({one_line(error)}): {_REMEDY}") from error
    assert isinstance(rendered, str)
    return rendered


def _whose(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"the chat template of {tokenizer.name_or_path}" if tokenizer.name_or_path else "the chat template"
