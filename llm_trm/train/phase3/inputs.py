"""What phase 3 reads before it trains: problems, their held-out part, and a model with a recursion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from llm_trm.data.grading import is_correct
from llm_trm.data.problems import Question, load_questions
from llm_trm.data.questions import fingerprint
from llm_trm.errors import InputError
from llm_trm.models.causal.loading import LatentModel, load_latent_model
from llm_trm.text import normalise_spaces
from llm_trm.train.phase3.config import Phase3Config
from llm_trm.train.run.trainer import TrainerRun


@dataclass(frozen=True)
class Problems:
    """Questions with answers that can be graded; the two parts share no question.

    Attributes:
        training, held_out: The parts.
        dropped: Number of questions left out because their answer cannot be graded.
    """

    training: list[Question]
    held_out: list[Question]
    dropped: int


@dataclass(frozen=True)
class Inputs:
    """What a run learns from.

    Attributes:
        problems: The problems.
        latent: The model, ready to be trained.
        prompts: Problems per step, of all processes.
    """

    problems: Problems
    latent: LatentModel
    prompts: int


def read_inputs(config: Phase3Config, run: TrainerRun, prompts: int, device: torch.device) -> Inputs:
    """Read the problems and load the model.

    Args:
        prompts: Problems per step, of all processes.
        device: For the model.

    Raises:
        InputError: Problems or a model that cannot be read, too few problems, or others than when ``run``
            began.
    """
    problems = load_problems(config, prompts)
    digest = fingerprint((one.text, one.answer) for one in (*problems.training, *problems.held_out))
    run.require_same_data("problems", digest, f"--data {config.data}")
    latent = load_latent_model(
        config.checkpoint, device, trainable=True, trust_remote_code=config.trust_remote_code
    )
    return Inputs(problems, latent, prompts)


def load_problems(config: Phase3Config, prompts: int) -> Problems:
    """The held-out problems, then as many others as the run needs, or all if there are fewer.

    Args:
        prompts: Problems per step, of all processes.

    Raises:
        InputError: Too few problems with an answer that can be graded.
    """
    dropped = 0

    def graded(questions: list[Question]) -> list[Question]:
        nonlocal dropped
        kept = [question for question in questions if _gradable(question)]
        dropped += len(questions) - len(kept)
        return kept

    def load(count: int, split: Any) -> list[Question]:
        return load_questions(config.data, count, split=split, seed=config.seed, world=config.world)

    held_out = graded(load(config.eval_samples, "test"))
    asked = {normalise_spaces(question.text) for question in held_out}
    wanted = config.steps * prompts
    # Data with a single split contain the held-out problems again.
    training = [
        question
        for question in load(wanted + config.eval_samples, "train")
        if normalise_spaces(question.text) not in asked
    ]
    training = graded(training)[:wanted]
    if not held_out or len(training) < prompts:
        raise InputError(
            f"--data {config.data} has {len(held_out)} problems to hold out and {len(training)} others "
            f"whose answer can be graded, but a step needs {prompts}: use more problems, a smaller "
            "--batch-size, or fewer --eval-samples"
        )
    return Problems(training, held_out, dropped)


def _gradable(question: Question) -> bool:
    return question.answer is not None and is_correct("", question.answer) is not None
