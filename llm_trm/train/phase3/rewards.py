"""Rewards of completions: functions with the signature that TRL's trainers call."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from llm_trm.choices import PromptForm
from llm_trm.data.grading import is_correct
from llm_trm.data.tags import THINK
from llm_trm.evaluate.answers import answer_tokens, own_answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: TRL calls it with lists of equal length, by name, with None for completions that cannot be graded.
Reward = Callable[..., list[float | None]]


def correctness_reward(
    tokenizer: PreTrainedTokenizerBase, form: PromptForm, tags: tuple[int, int], ends: Collection[int]
) -> Reward:
    """A reward of 1 for completions whose answer is the reference's, and 0 for others.

    Answers are read as ``llm-trm eval lm`` reads them: after the thinking, which must be closed in a chat. An
    answer without an end token does not count, since it may stop in the middle of a number. Numbers are
    compared by value. The reward is None if the reference has no final answer.

    Args:
        tokenizer: Decodes completions.
        form: How questions are put.
        tags: Ids of ``<think>`` and ``</think>``.
        ends: Ids of tokens that end a completion.
    """

    def correctness(
        *,
        prompts: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        answer: Sequence[str],
        **_: Any,
    ) -> list[float | None]:
        verdicts = []
        for prompt, ids, wanted in zip(prompts, completion_ids, answer, strict=True):
            said, asks_itself = _answer(tokenizer, form, tags, prompt, ids)
            ended = asks_itself or (bool(ids) and ids[-1] in ends)
            verdicts.append(is_correct(said if ended else "", wanted))
        return [None if verdict is None else float(verdict) for verdict in verdicts]

    return correctness


def format_reward(
    tokenizer: PreTrainedTokenizerBase, form: PromptForm, tags: tuple[int, int], ends: Collection[int]
) -> Reward:
    """A reward of 1 for completions in the format that the model was taught, and 0 for others.

    That format is one ``<think>`` at the end of the prompt or the start of the completion, in a chat one
    ``</think>`` after it, then an answer and an end token.

    Args:
        tokenizer, form, tags, ends: As for :func:`correctness_reward`.
    """
    think, end_think = tags

    def well_formed(prompt: str, ids: Sequence[int]) -> bool:
        given = _opens(prompt)
        begins = given or (bool(ids) and ids[0] == think)
        thoughts = list(ids).count(think) + given
        closings = list(ids).count(end_think)
        ended = bool(ids) and ids[-1] in ends
        answered = bool(_answer(tokenizer, form, tags, prompt, ids)[0])
        return begins and thoughts == 1 and closings == (form == "chat") and ended and answered

    def format(
        *, prompts: Sequence[str], completion_ids: Sequence[Sequence[int]], **_: Any
    ) -> list[float | None]:
        return [float(well_formed(prompt, ids)) for prompt, ids in zip(prompts, completion_ids, strict=True)]

    return format


def _opens(prompt: str) -> bool:
    # A chat template that opens the thought may add a line break.
    return prompt.rstrip().endswith(THINK)


def _answer(
    tokenizer: PreTrainedTokenizerBase,
    form: PromptForm,
    tags: tuple[int, int],
    prompt: str,
    ids: Sequence[int],
) -> tuple[str, bool]:
    """The text after the thinking, which may be empty, and whether the next question follows it."""
    given = [tags[0]] if _opens(prompt) else []
    said = answer_tokens(given, ids, tags, open_ended=form == "plain")
    text, asks_itself = str(tokenizer.decode(said or [], skip_special_tokens=True)), False
    if form == "plain":
        text, asks_itself = own_answer(text)
    return text.strip(), asks_itself
