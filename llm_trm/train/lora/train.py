"""Trains a language model to recur at ``<think>`` and answer, with adapters on its attention."""

from __future__ import annotations

import logging
import random
import shutil
import time
import warnings
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from llm_trm.data.problems import located
from llm_trm.data.processes import world_size
from llm_trm.data.questions import Solved, fingerprint, load_solved
from llm_trm.errors import InputError
from llm_trm.extras import require
from llm_trm.files import read_json, writable_folder, write_json
from llm_trm.models.causal.loading import FACTS_FILE, clear_model, save_latent_model
from llm_trm.models.loading import language_model_source, no_bars
from llm_trm.text import normalise_spaces
from llm_trm.train.lora.callbacks import WriteFacts, WriteMetrics
from llm_trm.train.lora.config import LoraTrainingConfig
from llm_trm.train.lora.curriculum import StagedOrder
from llm_trm.train.lora.data import Collator, Lessons
from llm_trm.train.lora.model import Trainee, build_trainee
from llm_trm.train.lora.trainer import (
    KeepBest,
    LatentTrainer,
    checkpoints,
    eval_losses,
    last_checkpoint,
    take_up_finished,
    trainer_state,
)
from llm_trm.train.run.tracking import require_tracker
from llm_trm.upstream import checkpointing_option

_logger = logging.getLogger(__name__)

#: Of a run: its settings.
SETTINGS_FILE = "lora.json"
#: Among them: a fingerprint of all questions.
_QUESTIONS = "questions_sha256"
#: Share of the updates in which a curriculum changes the task.
_CHANGING = 0.5


@dataclass(frozen=True)
class LoraPlan:
    """What a run is about to do.

    Attributes:
        training, held_out: Questions.
        left_out: Questions that are longer than allowed.
        shared: Questions to train on that were left out because they are held out.
        thinking: Questions with written thinking, among those to train on.
        trainable, parameters: Numbers of the model, without and with the frozen ones.
        reasoner: The reasoner in words.
        form: How questions are put.
        added: Tokens that the tokenizer did not have.
        start: Update to go on from.
    """

    training: int
    held_out: int
    left_out: int
    shared: int
    thinking: int
    trainable: int
    parameters: int
    reasoner: str
    form: str
    added: list[str]
    start: int


@dataclass(frozen=True)
class LoraResult:
    """How a run ended.

    Attributes:
        output: Folder of the model: the one with the lowest loss on what is held out.
        best_step: The update that it is from.
        metrics: What was measured then.
        history: What the Trainer logged: training every few updates, ``eval_...`` at evaluations.
        stopped_early: Whether patience ended it.
        seconds: Of training, in this process.
        main: Whether this process is the one to tell of it.
    """

    output: Path
    best_step: int
    metrics: dict[str, float]
    history: list[dict[str, Any]]
    stopped_early: bool
    seconds: float
    main: bool


class LoraReport:
    """Who is told of a run; does nothing. ``callback`` is a ``TrainerCallback`` that follows it, or None."""

    callback: Any = None

    def begin(self, plan: LoraPlan) -> None:
        """The training is about to begin."""


def train_lora(config: LoraTrainingConfig, report: LoraReport | None = None) -> LoraResult:
    """Train, and write the best model to ``config.output`` for ``load_latent_model``.

    Raises:
        InputError: Data, a model or a folder that cannot be used, or nothing to resume.
    """
    require("train", "transformers", "accelerate")
    from transformers import set_seed

    world_size()
    resumed = _permit(config)
    solved = load_solved(config.data, whole_answers=config.whole_answers)
    held_out, shared = None, 0
    if config.val_data is not None:
        held_out = load_solved(config.val_data, split="test", whole_answers=config.whole_answers)
    questions = fingerprint(astuple(row) for row in (*solved, *(held_out or ())))
    if resumed is not None:
        _require_same_questions(config, questions)
    if held_out is not None:
        solved, shared = _apart(config, solved, held_out)
    if (config.curriculum or config.distill) and not any(row.thinks and row.thinking for row in solved):
        raise InputError(
            f"{config.data} has no written thinking (a column thinking, or reasoning before ####), which "
            "--curriculum and --distill need"
        )
    set_seed(config.seed)
    trainee = build_trainee(config)
    limit = _limit(config, trainee)
    teacher = config.distill > 0
    lessons, left_out = _within(
        Lessons(solved, trainee.tokenizer, trainee.form, stages=config.curriculum, teacher=teacher),
        limit,
        config.data,
    )
    if held_out is None:
        learnt, held_out = _split(lessons.solved, config.val_fraction, config.seed)
        lessons = lessons.kept(learnt)
    held_out = held_out[: config.eval_samples]
    judged, too_long = _within(
        Lessons(held_out, trainee.tokenizer, trainee.form), limit, config.val_data or config.data
    )
    trainer, keeper = _trainer(config, trainee, lessons, judged, resumed, report)
    if trainer.is_world_process_zero():
        if config.overwrite:
            _clear(config.output)
        writable_folder(config.output)
        write_json(config.output / SETTINGS_FILE, {**config.record(), _QUESTIONS: questions})
    if report is not None and trainer.is_world_process_zero():
        report.begin(
            LoraPlan(
                training=len(lessons),
                held_out=len(judged),
                left_out=left_out + too_long,
                shared=shared,
                thinking=lessons.thinking,
                trainable=_count(trainee.model, trained=True),
                parameters=_count(trainee.model, trained=False),
                reasoner=_in_words(trainee.model.config),
                form=trainee.form,
                added=trainee.added,
                start=0 if resumed is None else int(resumed.name.rpartition("-")[2]),
            )
        )
    began = time.monotonic()
    with no_bars(), warnings.catch_warnings():
        # What torch says of bfloat16 states and a norm of float32, which is as it should be.
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight", UserWarning)
        if resumed is None or not take_up_finished(trainer, resumed, config.output, best=True):
            trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
        seconds = time.monotonic() - began
        history = list(trainer.state.log_history)
        metrics = _best(history)
        _save(config, trainee, trainer, metrics)
    trainer.accelerator.wait_for_everyone()
    return LoraResult(
        output=config.output,
        best_step=int(metrics["step"]),
        metrics=metrics,
        history=history,
        stopped_early=keeper.stopped,
        seconds=seconds,
        main=trainer.is_world_process_zero(),
    )


def _permit(config: LoraTrainingConfig) -> Path | None:
    """The checkpoint to go on from, None to begin; InputError if neither may be."""
    require_tracker(config.track)
    settings = config.output / SETTINGS_FILE
    for source in (language_model_source(config.model), config.trm):
        if source is not None and Path(source).resolve() == config.output.resolve():
            raise InputError(f"--output {config.output} is what the run begins with: choose another folder")
    if not config.resume:
        # What was cut off before its first checkpoint is nothing to lose.
        holds = last_checkpoint(config.output) is not None or (config.output / FACTS_FILE).exists()
        if holds and not config.overwrite:
            raise InputError(
                f"{config.output} holds a run already: go on with --resume, replace it with --overwrite, or "
                "choose another folder"
            )
        return None
    found = last_checkpoint(config.output)
    if found is None:
        raise InputError(f"{config.output} holds no checkpoint to resume: leave --resume out")
    config.require_same(read_json(settings, "leave --resume out"))
    state = trainer_state(found)
    if _keeper(config).exhausted(state["log_history"], state["max_steps"]):
        raise InputError(
            f"{config.output} ended early, after {config.patience} evaluations without a lower loss: raise "
            "--patience to go on"
        )
    return found


def _require_same_questions(config: LoraTrainingConfig, questions: str) -> None:
    before = read_json(config.output / SETTINGS_FILE, "leave --resume out").get(_QUESTIONS, questions)
    if before != questions:
        sources = " or ".join(source for source in (config.data, config.val_data) if source is not None)
        raise InputError(
            f"{sources} holds other questions than when the run in {config.output} began, and what was "
            "trained on may be held out now: begin again with --overwrite, or choose another folder"
        )


def _apart(
    config: LoraTrainingConfig, solved: Sequence[Solved], held_out: Sequence[Solved]
) -> tuple[list[Solved], int]:
    """Rows whose questions are not held out, and how many there are besides."""
    away = {normalise_spaces(row.question) for row in held_out}
    learnt = [row for row in solved if normalise_spaces(row.question) not in away]
    if not learnt:
        raise InputError(
            f"--val-data {config.val_data} holds every question of {config.data}: give others, or leave it "
            "out"
        )
    return learnt, len(solved) - len(learnt)


def _clear(folder: Path) -> None:
    """Remove what a run left: settings, checkpoints, weights. What else lies there may be somebody's own."""
    (folder / SETTINGS_FILE).unlink(missing_ok=True)
    for path in checkpoints(folder):
        shutil.rmtree(path)
    clear_model(folder)


def _split(solved: Sequence[Solved], fraction: float, seed: int) -> tuple[list[int], list[Solved]]:
    """Which rows to train on, and a share of the different questions, none of which is among those."""
    first = {normalise_spaces(row.question): row for row in reversed(solved)}
    questions = sorted(first, key=lambda words: first[words].question)
    if len(questions) < 2:
        raise InputError(
            "one question cannot be held out from itself: give more of them, or others with --val-data"
        )
    random.Random(seed).shuffle(questions)
    count = min(len(questions) - 1, max(1, round(fraction * len(questions))))
    away = set(questions[:count])
    learnt = [index for index, row in enumerate(solved) if normalise_spaces(row.question) not in away]
    return learnt, [first[question] for question in questions[:count]]


def _limit(config: LoraTrainingConfig, trainee: Trainee) -> int | None:
    context = trainee.model.config.context
    return min((n for n in (context, config.max_length) if n is not None), default=None)


def _within(lessons: Lessons, limit: int | None, source: str) -> tuple[Lessons, int]:
    """Lessons of at most ``limit`` tokens, and how many there are besides."""
    if limit is None:
        return lessons, 0
    fitting = [index for index in range(len(lessons)) if lessons.longest(index) <= limit]
    if not fitting:
        raise InputError(
            f"{source}: every question with its answer is longer than {limit} tokens, the model's context or "
            "--max-length: shorten them, or choose a model with a longer context"
        )
    return lessons.kept(fitting), len(lessons) - len(fitting)


def _keeper(config: LoraTrainingConfig) -> KeepBest:
    return KeepBest(config.keep, config.patience, _CHANGING if config.curriculum else 0.0)


def _trainer(
    config: LoraTrainingConfig,
    trainee: Trainee,
    lessons: Lessons,
    judged: Lessons,
    resumed: Path | None,
    report: LoraReport | None,
) -> tuple[LatentTrainer, KeepBest]:
    from transformers import PrinterCallback, TrainingArguments

    checkpointing = checkpointing_option()
    options: dict[str, Any] = {
        checkpointing: config.gradient_checkpointing,
        f"{checkpointing}_kwargs": {"use_reentrant": False} if config.gradient_checkpointing else None,
    }
    arguments = TrainingArguments(
        output_dir=str(config.output),
        num_train_epochs=config.epochs,
        max_steps=-1 if config.steps is None else config.steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=config.warmup_ratio,
        weight_decay=config.weight_decay,
        max_grad_norm=config.clip_norm,
        bf16=config.bf16,
        use_cpu=config.device_type == "cpu",
        seed=config.seed,
        eval_strategy="steps",
        eval_steps=config.eval_every,
        save_strategy="steps",
        save_steps=config.eval_every,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,
        logging_steps=config.log_every,
        report_to=config.track if config.track in ("wandb", "tensorboard") else "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        # With a <think> in every process or in none, all trained weights take part in every loss.
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=config.device_type == "cuda",
        **options,
    )
    if arguments.n_gpu > 1:
        # The Trainer would use them all in one process, by DataParallel: several take `accelerate launch`.
        arguments._n_gpu = 1
    keeper = _keeper(config)
    callbacks = [keeper, WriteFacts(config, trainee)]
    if config.track == "jsonl":
        callbacks.append(WriteMetrics(config.output, resumed))
    if report is not None and report.callback is not None:
        callbacks.append(report.callback)
    trainer = LatentTrainer(
        order=StagedOrder(len(lessons), config.curriculum, config.seed),
        distill=config.distill,
        recursion_rate=config.recursion_rate,
        think=trainee.model.config.think_token_id,
        model=trainee.model,
        args=arguments,
        train_dataset=lessons,
        eval_dataset=judged,
        data_collator=Collator(trainee.tokenizer.pad_token_id),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, keeper


def _best(history: Sequence[dict[str, Any]]) -> dict[str, float]:
    losses = eval_losses(history)
    best = min(losses, key=lambda step: losses[step])
    entry = next(entry for entry in history if "eval_loss" in entry and entry["step"] == best)
    return {name.removeprefix("eval_"): value for name, value in entry.items()}


def _save(
    config: LoraTrainingConfig, trainee: Trainee, trainer: LatentTrainer, metrics: dict[str, float]
) -> None:
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    # Every process takes part in gathering what is shared out among them.
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded else None
    if not trainer.is_world_process_zero():
        return
    if config.merge and sharded:
        _logger.warning(
            "weights are shared out among processes: adapters are written as they are, not merged"
        )
    # A run that goes on may have written adapters first and merge them now, or the other way round.
    clear_model(config.output)
    save_latent_model(
        trainer.accelerator.unwrap_model(trainer.model),
        trainee.tokenizer,
        config.output,
        base=config.model,
        prompt_form=trainee.form,
        merge=config.merge and not sharded,
        state_dict=weights,
        data=located(config.data),
        updates=metrics["step"],
        held_out_loss=round(metrics["loss"], 4),
        training=config.record(),
        held_out=metrics,
    )


def _count(model: Any, *, trained: bool) -> int:
    return sum(
        parameter.numel() for parameter in model.parameters() if parameter.requires_grad or not trained
    )


def _in_words(config: Any) -> str:
    if config.reasoner == "latents":
        size = f"{config.num_latents} latents"
    else:
        size = f"D' = {config.d_compressed}, soft tokens: {config.soft_tokens}"
    return (
        f"{config.reasoner} ({size}; {config.n_latent_steps} latent steps, {config.n_deep_recursions} deep "
        f"recursions, {config.supervision_steps} supervision steps)"
    )
