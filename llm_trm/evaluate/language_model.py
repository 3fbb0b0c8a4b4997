"""What a recursion is worth to a language model, beside answering at once and written-out thinking."""

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
from llm_trm.evaluate.language_model_modes import Decoding, Mode, Reply, Speaker
from llm_trm.evaluate.statistics import group_labels, value_of, wilson

#: Tokens that each mode writes to warm up.
_WARM_UP_TOKENS = 16
_RESAMPLES = 2000


@dataclass(frozen=True)
class ModeScores:
    """Means over problems of one mode.

    Attributes:
        problems: How many.
        correct: Answered rightly and to the end.
        accuracy, interval: Their share, and its 95% Wilson interval.
        tokens: Generated, the end token included.
        cut: Share of problems whose answer did not end within the limit of tokens.
        soft_tokens: That recursions appended.
        steps: Supervision steps of all recursions of a problem.
        thoughts: Recursions.
        seconds: Wall time of the generation, the median batch's divided by its problems; None of a group,
            whose problems share batches with others.
        spread: 20th and 80th percentile of that over the batches.
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
    """What the recursion gives, and costs, as a share of what thinking does.

    Attributes:
        gap_closed: Of the gap in accuracy between answering at once and thinking; None where thinking gains
            nothing.
        gap_closed_interval: Its 95% interval, by resampling problems; None where a resample has no gap.
        tokens, seconds: Of thinking's tokens, and of its wall time: the median over batches, which both
            answered one right after the other.
    """

    gap_closed: float | None
    gap_closed_interval: tuple[float, float] | None
    tokens: float
    seconds: float


@dataclass(frozen=True)
class LanguageModelEvaluation:
    """What :func:`evaluate_language_model` found.

    Attributes:
        modes: Scores over all problems.
        ratios: Of ``latent``, if all three modes ran.
        by: The field that problems were grouped by, or None.
        groups: Scores of each group.
        batch_seconds: Wall time of each batch: their sum counts what a median leaves out.
    """

    modes: dict[Mode, ModeScores]
    ratios: Ratios | None
    by: str | None = None
    groups: dict[str, dict[Mode, ModeScores]] = field(default_factory=dict)
    batch_seconds: dict[Mode, list[float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def evaluate_language_model(
    speakers: Mapping[Mode, Speaker],
    questions: Sequence[Question],
    decoding: Decoding,
    *,
    batch_size: int = 32,
    by: str | None = None,
    progress: Callable[[int], object] = lambda _: None,
) -> LanguageModelEvaluation:
    """Let every mode answer the same questions, the same batches one mode after the other.

    Modes take turns batch by batch, each batch begun by another, so that a machine that slows down slows all
    of them. Each has written a few tokens before the clock starts.

    Args:
        speakers: By mode.
        questions: Whose reference answers can be compared with, as :func:`require_graded` leaves them.
        decoding: How tokens are chosen.
        batch_size: Problems at a time; the time of a batch is that of its longest answer.
        by: Field of the records to group by, or ``"operations"``; see
            :func:`~llm_trm.evaluate.statistics.value_of`.
        progress: Called with 1 when a mode has answered a batch.

    Raises:
        InputError: A prompt that does not fit, or a field that no record has.
    """
    values = [] if by is None else _values(questions, by)
    prompts = {
        mode: [speaker.encode(question.text) for question in questions] for mode, speaker in speakers.items()
    }
    warm_up = replace(decoding, max_new_tokens=min(decoding.max_new_tokens, _WARM_UP_TOKENS))
    for mode, speaker in speakers.items():
        speaker.reply(prompts[mode][:batch_size], warm_up)
    replies: dict[Mode, list[Reply]] = {mode: [] for mode in speakers}
    seconds: dict[Mode, list[float]] = {mode: [] for mode in speakers}
    order = list(speakers)
    for start in range(0, len(questions), batch_size):
        for mode in order:
            made, took = speakers[mode].reply(prompts[mode][start : start + batch_size], decoding)
            replies[mode] += made
            seconds[mode].append(took)
            progress(1)
        order = order[1:] + order[:1]
    right = {mode: _right(made, questions) for mode, made in replies.items()}

    def scores(mode: Mode, chosen: Sequence[int]) -> ModeScores:
        made = [replies[mode][number] for number in chosen]
        return _score(made, right[mode][list(chosen)], speakers[mode].soft_tokens)

    everything = range(len(questions))
    modes = {}
    for mode in speakers:
        low, middle, high = _quantiles(seconds[mode], len(questions), batch_size)
        modes[mode] = replace(scores(mode, everything), seconds=middle, spread=(low, high))
    groups = {
        label: {mode: scores(mode, members) for mode in speakers}
        for label, members in _members(values).items()
    }
    return LanguageModelEvaluation(modes, _ratios(modes, right, seconds), by, groups, seconds)


def require_graded(questions: Sequence[Question]) -> list[Question]:
    """Those whose reference answers can be compared with.

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
            f"none of the {len(questions)} problems has an answer that can be compared with: give each "
            "record an answer that is one line, or ends in #### and the answer, or holds \\boxed{}"
        )
    return graded


def _right(replies: Sequence[Reply], questions: Sequence[Question]) -> Tensor:
    """Which were answered rightly, and to the end: what is cut may be the half of a number. bool [N]"""
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
    """The 20th percentile over batches of the time a problem, the median, and the 80th percentile."""
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
    """Problems are resampled whole, as all modes answered the same ones."""
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
    """Numbers of the problems of each group, groups in the order of their values."""

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
