"""Exact-match accuracy of a language model on problems, with or without thinking first."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from llm_trm.data.lessons import encode_prompts, question_prompt
from llm_trm.data.passages import own_token
from llm_trm.data.tags import END_THINK, THINK

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llm_trm.data.arithmetic import Problem


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of answers.

    Attributes:
        correct, total: Number of correct answers, and of problems.
        generated: Mean number of generated tokens per problem, including the end token.
    """

    correct: int
    total: int
    generated: float

    @property
    def share(self) -> float:
        """Accuracy in [0, 1]."""
        return self.correct / max(self.total, 1)


def answer_tokens(
    prompt: Sequence[int],
    written: Sequence[int],
    tags: tuple[int, int] | None,
    *,
    open_ended: bool = False,
) -> list[int] | None:
    """The tokens after the thinking in ``written``; None if the thinking was never closed.

    Args:
        prompt, written: Prompt tokens, and generated tokens up to an end token.
        tags: Ids of ``<think>`` and ``</think>``; None for a model that does not think.
        open_ended: Whether an answer may directly follow ``<think>``, as in the plain prompt form.
    """
    if tags is None:
        return list(written)
    think, end_think = tags
    last = {token: index for index, token in enumerate((*prompt, *written)) if token in tags}
    opened, closed = last.get(think, -1), last.get(end_think, -1)
    if opened > closed and not open_ended:
        return None
    return list(written)[max(max(opened, closed) + 1 - len(prompt), 0) :]


def answer_of(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], written: Sequence[int]) -> str:
    """The text of :func:`answer_tokens` for a chat prompt; empty if the thinking was never closed."""
    think, end_think = (own_token(tokenizer, tag) for tag in (THINK, END_THINK))
    tags = None if think is None or end_think is None else (think, end_think)
    answer = answer_tokens(prompt, written, tags) or []
    return str(tokenizer.decode(answer, skip_special_tokens=True)).strip()


def own_answer(text: str) -> tuple[str, bool]:
    """Cut a plain-form answer at the next question that the model generates; whether there is one."""
    answer, asked, _ = text.partition("\nQuestion:")
    return answer, bool(asked)


def written_length(tokens: Sequence[int], ends: Collection[int]) -> tuple[int, bool]:
    """Number of ``tokens`` up to and including the first of ``ends``, and whether there is one."""
    length = next((index + 1 for index, token in enumerate(tokens) if token in ends), None)
    return (len(tokens), False) if length is None else (length, True)


@torch.no_grad()
def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    *,
    thinking: bool,
    max_new_tokens: int = 256,
    batch_size: int = 256,
) -> Accuracy:
    """Greedy exact-match accuracy on ``problems``.

    Args:
        tokenizer: A tokenizer with ``<think>`` and ``</think>``, and a chat template.
        thinking: Whether the model should think first.
        max_new_tokens: Maximum number of generated tokens. An unfinished answer counts as wrong.
    """
    ends = {tokenizer.eos_token_id}
    correct = generated = 0
    for start in range(0, len(problems), batch_size):
        batch = problems[start : start + batch_size]
        prompts = [
            question_prompt(tokenizer, problem.question, "chat", thinking=thinking, recurs=False)
            for problem in batch
        ]
        inputs = encode_prompts(tokenizer, prompts, "chat").to(model.device)
        given: Any = inputs["input_ids"]
        length = given.shape[1]
        # Any, because transformers' annotation of generate loses the return type.
        generate: Any = model.generate
        out = generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)[:, length:]
        for asked, row, problem in zip(given.tolist(), out.tolist(), batch, strict=True):
            written = row[: written_length(row, ends)[0]]
            generated += len(written)
            correct += answer_of(tokenizer, asked, written) == problem.answer
    return Accuracy(correct, len(problems), generated / max(len(problems), 1))
