"""Exact-match accuracy of a language model that answers problems, with or without thinking first."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from llm_trm.data.lessons import question_prompt
from llm_trm.models.tiny import END_THINK

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


def answer_of(text: str) -> str:
    """What a model says after it has thought: the text behind the last ``</think>``, or all of it."""
    return text.rpartition(END_THINK)[2].strip()


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
        tokenizer: With left padding and a chat template that takes ``enable_thinking``.
        thinking: Whether the model is to think first.
        max_new_tokens: Where an answer that does not end is cut, and counted as wrong.
    """
    correct = generated = 0
    for start in range(0, len(problems), batch_size):
        batch = problems[start : start + batch_size]
        prompts = [
            question_prompt(tokenizer, problem.question, "chat", thinking=thinking) for problem in batch
        ]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        inputs = inputs.to(model.device)
        length = inputs["input_ids"].shape[1]
        # Typed as Any: transformers' own annotation of generate loses its type.
        generate: Any = model.generate
        out = generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)[:, length:]
        ends = {tokenizer.eos_token_id}
        generated += sum(written_length(row, ends)[0] for row in out.tolist())
        texts = tokenizer.batch_decode(out, skip_special_tokens=True)
        correct += sum(answer_of(text) == problem.answer for text, problem in zip(texts, batch, strict=True))
    return Accuracy(correct, len(problems), generated / max(len(problems), 1))
