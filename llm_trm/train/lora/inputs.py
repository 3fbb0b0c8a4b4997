"""What ``llm-trm train lora`` reads before it trains: questions, their held-out part, and a model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from transformers import set_seed

from llm_trm.data.questions import Solved, fingerprint, load_solved
from llm_trm.errors import InputError
from llm_trm.text import normalise_spaces
from llm_trm.train.lora.config import LoraTrainingConfig
from llm_trm.train.lora.data import Lessons
from llm_trm.train.lora.model import Trainee, build_trainee
from llm_trm.train.run.trainer import TrainerRun


@dataclass(frozen=True)
class Inputs:
    """What a run learns from.

    Attributes:
        trainee: The model.
        training, held_out: Questions to train on, and others to evaluate on.
        left_out: Number of questions that are longer than allowed.
        shared: Number of questions not trained on because they are held out.
    """

    trainee: Trainee
    training: Lessons
    held_out: Lessons
    left_out: int
    shared: int


def read_inputs(config: LoraTrainingConfig, run: TrainerRun) -> Inputs:
    """Read the questions and build the model, with the seed of the run.

    Raises:
        InputError: Data or a model that cannot be read, parts that do not fit together, too few questions, or
            others than when ``run`` began.
    """
    solved = load_solved(config.data, whole_answers=config.whole_answers)
    held_out, shared = None, 0
    if config.val_data is not None:
        held_out = load_solved(config.val_data, split="test", whole_answers=config.whole_answers)
    digest = fingerprint(astuple(row) for row in (*solved, *(held_out or ())))
    run.require_same_data("questions", digest, config.data, config.val_data)
    if held_out is not None:
        solved, shared = _not_held_out(config, solved, held_out)
    if (config.curriculum or config.distill) and not any(row.thinks and row.thinking for row in solved):
        raise InputError(
            f"{config.data} has no written thinking (a column thinking, or reasoning before ####), which "
            "--curriculum and --distill need"
        )
    set_seed(config.seed)
    trainee = build_trainee(config)
    tokenizer, form = trainee.tokenizer, trainee.form
    lengths = (trainee.model.config.context, config.max_length)
    limit = min((length for length in lengths if length is not None), default=None)
    teacher = config.distill > 0
    lessons = Lessons(solved, tokenizer, form, stages=config.curriculum, teacher=teacher)
    training, left_out = _within(lessons, limit, config.data)
    if held_out is None:
        kept, held_out = _split(training.solved, config.val_fraction, config.seed)
        training = training.kept(kept)
    evaluated, too_long = _within(
        Lessons(held_out[: config.eval_samples], tokenizer, form), limit, config.val_data or config.data
    )
    return Inputs(trainee, training, evaluated, left_out + too_long, shared)


def _not_held_out(
    config: LoraTrainingConfig, solved: Sequence[Solved], held_out: Sequence[Solved]
) -> tuple[list[Solved], int]:
    """The rows whose questions are not held out, and the number of the others."""
    away = {normalise_spaces(row.question) for row in held_out}
    kept = [row for row in solved if normalise_spaces(row.question) not in away]
    if not kept:
        raise InputError(
            f"--val-data {config.val_data} contains every question of {config.data}: name other questions, "
            "or leave it out"
        )
    return kept, len(solved) - len(kept)


def _split(solved: Sequence[Solved], fraction: float, seed: int) -> tuple[list[int], list[Solved]]:
    """Indices of the rows to train on, and held-out rows: a fraction of the distinct questions."""
    first = {normalise_spaces(row.question): row for row in reversed(solved)}
    questions = sorted(first, key=lambda words: first[words].question)
    if len(questions) < 2:
        raise InputError(
            "a single question cannot be both trained on and held out: add others, or use --val-data"
        )
    random.Random(seed).shuffle(questions)
    count = min(len(questions) - 1, max(1, round(fraction * len(questions))))
    away = set(questions[:count])
    kept = [index for index, row in enumerate(solved) if normalise_spaces(row.question) not in away]
    return kept, [first[question] for question in questions[:count]]


def _within(lessons: Lessons, limit: int | None, source: str) -> tuple[Lessons, int]:
    """The lessons of at most ``limit`` tokens, and the number of the others."""
    if limit is None:
        return lessons, 0
    fitting = [index for index in range(len(lessons)) if lessons.longest(index) <= limit]
    if not fitting:
        raise InputError(
            f"{source}: every question with its answer is longer than {limit} tokens, the model's context or "
            "--max-length: shorten them, or choose a model with a longer context"
        )
    return lessons.kept(fitting), len(lessons) - len(fitting)
