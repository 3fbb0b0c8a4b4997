"""Settings of phase 3, and what it tells of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from llm_trm.data.arithmetic import World
from llm_trm.data.problems import Question
from llm_trm.errors import InputError
from llm_trm.ranges import (
    BATCH,
    CLIP_NORM,
    COUNT,
    GROUP,
    LEARNING_RATE,
    LENGTH,
    SPREAD,
    TRAINER_SEED,
    WEIGHT,
    require_ranges,
)
from llm_trm.train.run.config import as_json
from llm_trm.train.run.tracking import Track

#: Who writes ``<think>``: it ends every prompt, or the model has to.
ThinkBy = Literal["prompt", "model"]

#: Settings of a run that another may change when it goes on.
_FREE = {
    *("output", "resume", "overwrite", "track", "device", "log_every", "save_every", "eval_every"),
    *("trust_remote_code",),
}


@dataclass(frozen=True)
class Phase3Config:
    """Settings of :func:`~llm_trm.train.phase3.train.train_phase3`.

    Attributes:
        checkpoint: A language model with a recursion, trained to answer: a folder, or a name on the hub.
        output: Folder of the run: the trained model, ``checkpoint-N``, completions.
        dataset: Problems with answers, as for :func:`~llm_trm.data.problems.load_questions`.
        world: Of ``dataset`` ``"arithmetic"``.
        think: Who writes ``<think>``.
        group_size: Completions of a problem, whose rewards are compared.
        batch_size: Completions of one process at a time.
        gradient_accumulation: Batches of an optimizer step.
        kl: Weight of the divergence from the model at the start; 0 leaves it out.
        format_weight: Weight of the format's reward beside 1 for a right answer.
        steps: Optimizer steps.
        learning_rate: Peak of warm-up over 5% of the steps and linear decay. At 1e-4 models that answer
            nearly all lost up to 3% of the answers in 25 steps, and others gained less (docs/phase3.md).
        temperature: Of the completions.
        max_new_tokens: Longest completion.
        clip_norm: Largest norm of the gradient.
        gradient_checkpointing: Compute the decoder's activations twice instead of keeping them.
        eval_samples: Held-out problems.
        eval_every: Steps between two measurements of the greedy accuracy on them.
        log_every: Steps between two logged metrics, with the latest completions.
        save_every: Steps between checkpoints, of which the last three are kept.
        seed: Of problems, their order and completions.
        device: ``"cpu"`` keeps off accelerators.
        track: Where metrics go.
        resume: Go on from the last checkpoint in ``output``.
        overwrite: Replace the run in ``output``.
        trust_remote_code: Run the Python files that the language model brings, if it needs them.

    Raises:
        InputError: Both ``resume`` and ``overwrite``.
    """

    checkpoint: str
    output: Path
    dataset: str = "arithmetic"
    world: World = field(default_factory=World)
    think: ThinkBy = "prompt"
    group_size: Annotated[int, GROUP] = 8
    batch_size: Annotated[int, BATCH] = 64
    gradient_accumulation: Annotated[int, BATCH] = 1
    kl: Annotated[float, WEIGHT] = 0.1
    format_weight: Annotated[float, WEIGHT] = 0.2
    steps: Annotated[int, COUNT] = 200
    learning_rate: Annotated[float, LEARNING_RATE] = 3e-5
    temperature: Annotated[float, SPREAD] = 1.0
    max_new_tokens: Annotated[int, LENGTH] = 32
    clip_norm: Annotated[float, CLIP_NORM] = 1.0
    gradient_checkpointing: bool = False
    eval_samples: Annotated[int, COUNT] = 200
    eval_every: Annotated[int, COUNT] = 25
    log_every: Annotated[int, COUNT] = 5
    save_every: Annotated[int, COUNT] = 50
    seed: Annotated[int, TRAINER_SEED] = 0
    device: str = "cpu"
    track: Track | None = None
    resume: bool = False
    overwrite: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        require_ranges(self, InputError)
        if self.resume and self.overwrite:
            raise InputError("--resume goes on with a run and --overwrite replaces it: choose one")

    def record(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return as_json(self)

    def require_same(self, earlier: Mapping[str, Any]) -> None:
        """Raise InputError unless a run with the settings ``earlier`` can go on with these."""
        own = self.record()
        for name in own.keys() - _FREE:
            if name in earlier and own[name] != earlier[name]:
                raise InputError(
                    f"{self.output} was begun with {name} = {earlier[name]}, not {own[name]}: --resume goes "
                    "on with the same settings"
                )


@dataclass(frozen=True)
class Problems:
    """Questions with answers that can be graded; the two parts share no question.

    Attributes:
        training, held_out: The parts.
        dropped: Questions left out because their answer cannot be compared with.
    """

    training: list[Question]
    held_out: list[Question]
    dropped: int


@dataclass(frozen=True)
class Phase3Plan:
    """What a run is about to do, for its report.

    Attributes:
        problems: Of both parts.
        parameters: Numbers that are trained, and those that are frozen.
        prompts: Problems of an optimizer step, of all processes.
        group_size: Completions of each.
        steps: Of the whole run.
        start: Step to go on from.
        device: In words.
    """

    problems: Problems
    parameters: tuple[int, int]
    prompts: int
    group_size: int
    steps: int
    start: int
    device: str


@dataclass(frozen=True)
class Accuracy:
    """Greedy answers to the held-out problems.

    Attributes:
        correct, total: Right answers, and all.
    """

    correct: int
    total: int

    @property
    def share(self) -> float:
        """In [0, 1]."""
        return self.correct / max(self.total, 1)


@dataclass(frozen=True)
class Phase3Result:
    """How a run ended.

    Attributes:
        history: Records in order, each with ``step``: of training with ``reward``, of held-out problems with
            ``eval_accuracy``.
        before, after: Held-out accuracy of the model at the run's start and at its end.
    """

    history: Sequence[Mapping[str, Any]]
    before: Accuracy
    after: Accuracy


class Phase3Report:
    """Hears how a run goes; this one says nothing. Only the main process calls it."""

    def begin(self, plan: Phase3Plan) -> None:
        """Training begins."""

    def step(self, step: int) -> None:
        """Step ``step``, from 1, is done."""

    def record(self, record: Mapping[str, Any]) -> None:
        """A new record of the history; see :class:`Phase3Result`."""

    def end(self) -> None:
        """Training has ended, or failed."""
