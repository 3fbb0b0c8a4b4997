"""Compares a language model's recursion with direct answers and with written-out thinking."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from llm_trm.data.grading import is_correct
from llm_trm.data.problems import Question
from llm_trm.errors import InputError
from llm_trm.evaluate.decoding import Decoding, Mode
from llm_trm.evaluate.language_model_modes import Reply, Responder
from llm_trm.evaluate.statistics import group_labels, value_of, wilson

#: Number of tokens that each mode generates as a warm-up.
_WARM_UP_TOKENS = 16
_RESAMPLES = 2000


@dataclass(frozen=True)
class ModeScores:
    """Scores of one mode; means are over problems.

    Attributes:
        problems: Number of problems.
        correct: Number of problems with a complete and correct answer.
        accuracy, interval: Fraction of correct answers, and its 95% Wilson interval.
        tokens: Mean number of generated tokens, including the end token.
        cut: Fraction of problems whose answer exceeded the token limit.
        soft_tokens: Mean number of soft tokens.
        steps: Mean number of supervision steps over all recursions of a problem.
        thoughts: Mean number of recursions.
        seconds: Generation time per problem, the median over batches; None for a group, whose problems
            share batches with others.
        spread: 20th and 80th percentile of the time per problem over the batches.
    """

    problems: int
    correct: int
    accuracy: float
    interval: tuple[float, float]
    tokens: float
    cut: float
    soft_tokens: float = 0.0
    steps: float = 0.0
    thoughts: float = 0.0
    seconds: float | None = None
    spread: tuple[float, float] | None = None


@dataclass(frozen=True)
class Ratios:
    """Benefit and cost of the recursion relative to written-out thinking.

    Attributes:
        gap_closed: Fraction of the accuracy gap between direct answers and thinking that the recursion
            closes; None if thinking does not improve accuracy.
        gap_closed_interval: Its 95% bootstrap interval over problems; None if a resample has no gap.
        tokens, seconds: Tokens and wall time relative to thinking. The time ratio is the median over batches,
            which both modes answer in direct succession.
    """

    gap_closed: float | None
    gap_closed_interval: tuple[float, float] | None
    tokens: float
    seconds: float


@dataclass(frozen=True)
class LanguageModelEvaluation:
    """Result of :func:`evaluate_language_model`.

    Attributes:
        modes: Scores over all problems.
        ratios: Ratios of ``latent``, if all three modes ran.
        by: The field that problems were grouped by, or None.
        groups: Scores of each group.
        batch_seconds: Wall time of each batch, since a median hides outliers.
    """

    modes: dict[Mode, ModeScores]
    ratios: Ratios | None
    by: str | None = None
    groups: dict[str, dict[Mode, ModeScores]] = field(default_factory=dict)
    batch_seconds: dict[Mode, list[float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON values."""
        return asdict(self)


def evaluate_language_model(
    responders: Mapping[Mode, Responder],
    questions: Sequence[Question],
    decoding: Decoding,
    *,
    batch_size: int = 32,
    by: str | None = None,
    progress: Callable[[int], object] = lambda _: None,
) -> LanguageModelEvaluation:
    """Let every mode answer the same questions in the same batches.

    All modes answer each batch in turn, in a rotating order, so that a slowdown of the machine affects all of
    them. Each mode generates a few tokens as a warm-up before timing starts.

    Args:
        responders: A responder for each mode.
        questions: Questions with gradable reference answers, as returned by :func:`require_graded`.
        decoding: Decoding settings.
        batch_size: Problems per batch. The longest answer determines the time of a batch.
        by: Field of the records to group by, or ``"operations"``; see
            :func:`~llm_trm.evaluate.statistics.value_of`.
        progress: Called with 1 when a mode has answered a batch.

    Raises:
        InputError: A prompt does not fit the context, or no record has the field ``by``.
    """
    values = [] if by is None else _values(questions, by)
    prompts = {
        mode: [responder.encode(question.text) for question in questions]
        for mode, responder in responders.items()
    }
    warm_up = replace(decoding, max_new_tokens=min(decoding.max_new_tokens, _WARM_UP_TOKENS))
    for mode, responder in responders.items():
        responder.reply(prompts[mode][:batch_size], warm_up)
    replies: dict[Mode, list[Reply]] = {mode: [] for mode in responders}
    seconds: dict[Mode, list[float]] = {mode: [] for mode in responders}
    order = list(responders)
    for start in range(0, len(questions), batch_size):
        for mode in order:
            made, took = responders[mode].reply(prompts[mode][start : start + batch_size], decoding)
            replies[mode] += made
            seconds[mode].append(took)
            progress(1)
        order = order[1:] + order[:1]
    right = {mode: _right(made, questions) for mode, made in replies.items()}

    def scores(mode: Mode, chosen: Sequence[int]) -> ModeScores:
        made = [replies[mode][number] for number in chosen]
        return _score(made, right[mode][list(chosen)], responders[mode].soft_tokens)

    everything = range(len(questions))
    modes = {}
    for mode in responders:
        low, middle, high = _quantiles(seconds[mode], len(questions), batch_size)
        modes[mode] = replace(scores(mode, everything), seconds=middle, spread=(low, high))
    groups = {
        label: {mode: scores(mode, members) for mode in responders}
        for label, members in _members(values).items()
    }
    return LanguageModelEvaluation(modes, _ratios(modes, right, seconds), by, groups, seconds)


def require_graded(questions: Sequence[Question]) -> list[Question]:
    """Filter for questions whose reference answers can be graded.

    Raises:
        InputError: There are none.
    """
    graded = [
        question
        for question in questions
        if question.answer is not None and is_correct("", question.answer) is not None
    ]
    if not graded:
        raise InputError(
            f"none of the {len(questions)} problems has an answer that can be graded: give each record an "
            "answer that is one line, ends with #### and the final answer, or contains \\boxed{}"
        )
    return graded


def _right(replies: Sequence[Reply], questions: Sequence[Question]) -> Tensor:
    """Which answers are complete and correct, bool [N]; a truncated answer may end within a number."""
    return torch.tensor(
        [
            reply.finished and is_correct(reply.answer, str(question.answer)) is True
            for reply, question in zip(replies, questions, strict=True)
        ]
    )


def _score(replies: Sequence[Reply], right: Tensor, soft_tokens: int) -> ModeScores:
    count, correct = len(replies), int(right.sum())
    thoughts = sum(len(reply.steps) for reply in replies) / count
    return ModeScores(
        problems=count,
        correct=correct,
        accuracy=correct / count,
        interval=wilson(correct, count),
        tokens=sum(reply.tokens for reply in replies) / count,
        cut=sum(not reply.finished for reply in replies) / count,
        soft_tokens=soft_tokens * thoughts,
        steps=sum(sum(reply.steps) for reply in replies) / count,
        thoughts=thoughts,
    )


def _quantiles(seconds: Sequence[float], problems: int, batch_size: int) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile of the time per problem over batches."""
    sizes = [min(batch_size, problems - start) for start in range(0, problems, batch_size)]
    each = torch.tensor(seconds, dtype=torch.float64) / torch.tensor(sizes)
    low, middle, high = each.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return low, middle, high


def _ratios(
    modes: Mapping[Mode, ModeScores], right: Mapping[Mode, Tensor], seconds: Mapping[Mode, Sequence[float]]
) -> Ratios | None:
    if not {"no-think", "think", "latent"} <= modes.keys():
        return None
    think, latent = modes["think"], modes["latent"]
    gap = think.accuracy - modes["no-think"].accuracy
    closed = (latent.accuracy - modes["no-think"].accuracy) / gap if gap > 0 else None
    return Ratios(
        closed,
        None if closed is None else _gap_interval(right),
        latent.tokens / think.tokens,
        median(ours / theirs for ours, theirs in zip(seconds["latent"], seconds["think"], strict=True)),
    )


def _gap_interval(right: Mapping[Mode, Tensor]) -> tuple[float, float] | None:
    """Bootstrap interval. Each resample draws problems with the answers of all modes."""
    table = torch.stack([right["no-think"], right["think"], right["latent"]]).double()
    count = table.shape[1]
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for _ in range(_RESAMPLES):
        drawn = torch.randint(count, (count,), generator=generator)
        none, think, latent = table[:, drawn].mean(1).tolist()
        if think <= none:
            return None
        ratios.append((latent - none) / (think - none))
    low, high = torch.tensor(ratios).quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def _values(questions: Sequence[Question], by: str) -> list[Any]:
    values = [value_of({"problem": question.text, **question.record}, by) for question in questions]
    if all(value is None for value in values):
        raise InputError(f"--by {by}: no problem has such a field")
    return values


def _members(values: Sequence[Any]) -> dict[str, list[int]]:
    """Indices of the problems in each group, with groups ordered by value."""

    def rank(number: int) -> tuple[int, float, str]:
        value = values[number]
        if isinstance(value, (int, float)):
            return 0, float(value), ""
        return (2, 0.0, "") if value is None else (1, 0.0, str(value))

    labels = group_labels(values)
    members: dict[str, list[int]] = {}
    for number in sorted(range(len(values)), key=rank):
        members.setdefault(labels[number], []).append(number)
    return members
