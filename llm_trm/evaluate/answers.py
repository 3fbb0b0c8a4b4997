"""Exact-match accuracy of a language model that answers problems, with or without thinking first."""

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
    """How many answers were right.

    Attributes:
        correct, total: Problems answered rightly, and problems asked.
        generated: Tokens that the model wrote for a problem, on average, the end token included.
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
    """What stands behind the thinking in ``written``; None if the thinking was never closed.

    Args:
        prompt, written: Tokens, the second without what follows an end token.
        tags: Ids of ``<think>`` and ``</think>``; None where nobody thinks.
        open_ended: Whether an answer may follow ``<think>`` itself, as in the plain form of a prompt.
    """
    if tags is None:
        return list(written)
    think, end_think = tags
    last = {token: place for place, token in enumerate((*prompt, *written)) if token in tags}
    begun, closed = last.get(think, -1), last.get(end_think, -1)
    if begun > closed and not open_ended:
        return None
    return list(written)[max(max(begun, closed) + 1 - len(prompt), 0) :]


def answer_of(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], written: Sequence[int]) -> str:
    """The text of :func:`answer_tokens`, in a chat; empty if the thinking was never closed."""
    think, end_think = (own_token(tokenizer, tag) for tag in (THINK, END_THINK))
    tags = None if think is None or end_think is None else (think, end_think)
    said = answer_tokens(prompt, written, tags) or []
    return str(tokenizer.decode(said, skip_special_tokens=True)).strip()


def own_answer(text: str) -> tuple[str, bool]:
    """An answer in the plain form, up to the next question that the model asks itself; whether it does."""
    answer, asked, _ = text.partition("\nQuestion:")
    return answer, bool(asked)


def written_length(tokens: Sequence[int], ends: Collection[int]) -> tuple[int, bool]:
    """How many of ``tokens`` were written, up to the first of ``ends``, and whether there was one."""
    length = next((place + 1 for place, token in enumerate(tokens) if token in ends), None)
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
        tokenizer: With ``<think>`` and ``</think>``, and a chat template.
        thinking: Whether the model is to think first.
        max_new_tokens: Where an answer that does not end is cut, and counted as wrong.
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
        # Typed as Any: transformers' own annotation of generate loses its type.
        generate: Any = model.generate
        out = generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)[:, length:]
        for asked, row, problem in zip(given.tolist(), out.tolist(), batch, strict=True):
            written = row[: written_length(row, ends)[0]]
            generated += len(written)
            correct += answer_of(tokenizer, asked, written) == problem.answer
    return Accuracy(correct, len(problems), generated / max(len(problems), 1))
