"""Phase 3: GRPO on task reward, the language model frozen, its recursion trained. Needs the extra ``rl``."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_trm.data.grading import is_correct
from llm_trm.data.lessons import encode_each, opens_thought, question_prompt
from llm_trm.data.problems import Question, load_questions, located
from llm_trm.data.questions import fingerprint
from llm_trm.data.tags import THINK
from llm_trm.errors import InputError
from llm_trm.extras import require
from llm_trm.files import read_json, writable_folder, write_json
from llm_trm.models.causal.loading import FACTS_FILE, LatentModel, clear_model, load_latent_model
from llm_trm.models.loading import no_bars
from llm_trm.text import normalise_spaces
from llm_trm.train.phase3.config import Phase3Config
from llm_trm.train.phase3.report import Accuracy, Phase3Plan, Phase3Report, Phase3Result, Problems
from llm_trm.train.phase3.rewards import correctness_reward, format_reward
from llm_trm.train.run.tracking import finish_tracking, lines_until, new_accelerator, start_tracking
from llm_trm.upstream import checkpointing_option

require("rl", "trl")

from transformers import PrinterCallback, TrainerCallback  # noqa: E402
from trl.trainer.grpo_config import GRPOConfig  # noqa: E402

from llm_trm.evaluate.language_model_modes import UNPENALISED, end_tokens  # noqa: E402
from llm_trm.train.lora.trainer import (  # noqa: E402
    checkpoints,
    last_checkpoint,
    take_up_finished,
    trainer_state,
)
from llm_trm.train.phase3.trainer import COMPLETIONS_FILE, LatentGRPOTrainer  # noqa: E402

if TYPE_CHECKING:
    from accelerate import Accelerator

#: Settings of a run, in its folder.
SETTINGS_FILE = "phase3.json"
#: Among them: a fingerprint of the problems.
_PROBLEMS = "problems_sha256"
#: Of AdamW. Where all completions are right, what is left of the gradient is the rounding errors of the
#: divergence, 1e-8 an element, against 1e-4 in a step that teaches; 1e-8 would make full steps of them.
_EPSILON = 1e-6


def train_phase3(config: Phase3Config, report: Phase3Report | None = None) -> Phase3Result:
    """Train the reasoner of ``config.checkpoint``, and write the model to ``config.output``.

    Raises:
        InputError: Settings that do not fit together, no such model, too few problems, nothing to resume.
    """
    report = report or Phase3Report()
    arguments = _arguments(config)
    checkpoint = _begin(config)
    problems = load_problems(config, _prompts(config, arguments))
    asked = fingerprint((one.text, one.answer) for one in (*problems.training, *problems.held_out))
    if checkpoint is not None:
        _require_same_problems(config, asked)
    start = 0 if checkpoint is None else int(checkpoint.rpartition("-")[2])
    accelerator = new_accelerator(
        config.track, config.output, device=config.device, resumed_at=start if checkpoint else None
    )
    latent = load_latent_model(
        config.checkpoint, arguments.device, trainable=True, trust_remote_code=config.trust_remote_code
    )
    callback = _Callback(report, accelerator)
    trainer = make_trainer(config, arguments, latent, problems, [callback])
    if trainer.is_world_process_zero():
        if config.overwrite:
            clear_model(config.output)
            for old in checkpoints(config.output):
                shutil.rmtree(old)
        _keep_completions(config.output / COMPLETIONS_FILE, start)
        write_json(config.output / SETTINGS_FILE, {**config.record(), _PROBLEMS: asked})
        report.begin(_plan(config, trainer, problems, start))
    trainer.accelerator.wait_for_everyone()
    start_tracking(accelerator, "llm-trm-phase3", config.record())
    try:
        _run(trainer, checkpoint)
    finally:
        report.end()
        finish_tracking(accelerator)
    result = _result(trainer.state.log_history)
    trainer.facts |= {
        "phase3_steps": config.steps,
        "phase3_accuracy_before": round(result.before.share, 4),
        "phase3_accuracy_after": round(result.after.share, 4),
        "phase3": {**config.record(), "data": located(config.data)},
    }
    with no_bars():
        trainer.save_model(str(config.output))
    trainer.accelerator.wait_for_everyone()
    return result


def make_trainer(
    config: Phase3Config,
    arguments: GRPOConfig,
    latent: LatentModel,
    problems: Problems,
    callbacks: list[TrainerCallback],
) -> LatentGRPOTrainer:
    """The trainer of a run, which has not begun."""
    from datasets import Dataset

    tokenizer, form = latent.tokenizer, latent.prompt_form
    judged = tokenizer, form, _tags(latent), end_tokens(latent.model, tokenizer)
    rewards = [correctness_reward(*judged), format_reward(*judged)]
    opened = opens_thought(tokenizer, form)
    if opened and config.think == "model":
        raise InputError(
            f"the chat template of {latent.name} ends every prompt in {THINK}, which with --think model the "
            "model would have to write: leave --think out"
        )
    given = THINK if config.think == "prompt" and not opened else ""
    encoded: dict[str, list[int]] = {}

    def rows(questions: list[Question]) -> Dataset:
        asked = [question_prompt(tokenizer, question.text, form) for question in questions]
        prompts = [f"{prompt}{given}" for prompt in asked]
        # The tag apart: a tokenizer may join it with what stands before it.
        tag = [_tags(latent)[0]] if given else []
        encoded.update(
            (prompt, ids + tag)
            for prompt, ids in zip(prompts, encode_each(tokenizer, asked, form), strict=True)
        )
        return Dataset.from_list(
            [
                {"prompt": prompt, "answer": question.answer}
                for prompt, question in zip(prompts, questions, strict=True)
            ]
        )

    trainer = LatentGRPOTrainer(
        latent,
        rewards,
        arguments,
        rows(problems.training),
        rows(problems.held_out),
        # Those that were measured of older weights are left behind.
        {name: fact for name, fact in latent.facts.items() if name not in ("held_out", "held_out_loss")},
        encoded,
        callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def load_problems(config: Phase3Config, prompts: int) -> Problems:
    """The problems of a run: the held-out ones, then as many as it has steps for, or as there are.

    Args:
        config: Settings.
        prompts: Problems of an optimizer step, of all processes.

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
    # What has one split gives the held-out problems again.
    training = [
        question
        for question in load(wanted + config.eval_samples, "train")
        if normalise_spaces(question.text) not in asked
    ]
    training = graded(training)[:wanted]
    if not held_out or len(training) < prompts:
        raise InputError(
            f"--data {config.data} has {len(held_out)} problems to hold out and {len(training)} others "
            f"whose answer can be graded, and a step takes {prompts}: use more problems, a smaller "
            "--batch-size, or fewer --eval-samples"
        )
    return Problems(training, held_out, dropped)


def _gradable(question: Question) -> bool:
    return question.answer is not None and is_correct("", question.answer) is not None


def grpo_arguments(config: Phase3Config) -> GRPOConfig:
    """TRL's settings for a run."""
    # The old name draws a warning, and nothing is to be recomputed unless it is asked for.
    checkpointing: dict[str, Any] = {checkpointing_option(): config.gradient_checkpointing}
    return GRPOConfig(
        output_dir=str(config.output),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        num_generations=config.group_size,
        num_generations_eval=1,
        beta=config.kl,
        reward_weights=[1.0, _round(config.format_weight)],
        learning_rate=config.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=max(1, config.steps // 20),
        weight_decay=0.0,
        adam_epsilon=_EPSILON,
        max_grad_norm=config.clip_norm,
        temperature=config.temperature,
        max_completion_length=config.max_new_tokens,
        # Completions and what is trained on are computed in one precision, that of the weights.
        bf16=False,
        generation_kwargs={"min_p": 0.0, **UNPENALISED},
        **checkpointing,
        eval_strategy="steps",
        eval_steps=config.eval_every,
        eval_on_start=not config.resume,
        logging_steps=config.log_every,
        save_steps=config.save_every,
        save_total_limit=3,
        seed=config.seed,
        use_cpu=config.device_type == "cpu",
        use_cache=True,  # Otherwise Trainer turns it off in the model's config, which is saved.
        disable_tqdm=True,
        report_to="none",
        dataloader_num_workers=0,
    )


def _round(weight: float) -> float:
    """To a multiple of 1/1024, so that equal rewards have a mean that is equal to them.

    TRL divides by their spread and 1e-4: rounding errors would become advantages of 1e-3, and AdamW makes
    full steps of any gradient. Three steps without a wrong answer took a model from 64 right of 64 to 62.
    """
    return round(1024 * weight) / 1024


def _arguments(config: Phase3Config) -> GRPOConfig:
    if config.group_size < 2:
        raise InputError("--group-size must be at least 2: GRPO compares completions of one problem")
    try:
        return grpo_arguments(config)
    except ValueError as error:
        if "divisible" not in str(error):
            raise
        raise InputError(
            f"--batch-size {config.batch_size} (of each process, times --accumulation "
            f"{config.accumulation}) is no multiple of --group-size {config.group_size}: a step "
            "takes whole groups"
        ) from error


def _prompts(config: Phase3Config, arguments: Any) -> int:
    return int(arguments.generation_batch_size) // config.group_size


def _begin(config: Phase3Config) -> str | None:
    """Make the folder ready; the checkpoint to go on from, None for a new run."""
    output = config.output
    if Path(config.checkpoint).resolve() == output.resolve():
        raise InputError(f"--output {output} is the model to train: choose another folder")
    if config.resume:
        last = last_checkpoint(output)
        if last is None:
            raise InputError(f"{output} holds no checkpoint to resume: leave --resume out")
        config.require_same(read_json(output / SETTINGS_FILE, "start over with --overwrite"))
        trainer_state(last)
        return str(last)
    # What was cut off before its first checkpoint is nothing to lose.
    if not config.overwrite and (last_checkpoint(output) is not None or (output / FACTS_FILE).exists()):
        raise InputError(
            f"{output} holds a run already: go on with --resume, replace it with --overwrite, or choose "
            "another folder"
        )
    writable_folder(output)
    return None


def _require_same_problems(config: Phase3Config, problems: str) -> None:
    before = read_json(config.output / SETTINGS_FILE, "start over with --overwrite").get(_PROBLEMS, problems)
    if before != problems:
        raise InputError(
            f"--data {config.data} holds other problems than when the run in {config.output} began: "
            "start over with --overwrite, or choose another folder"
        )


def _tags(latent: LatentModel) -> tuple[int, int]:
    """Ids of ``<think>`` and ``</think>``."""
    think, end_think = latent.config.think_token_id, latent.config.end_think_token_id
    if think is None or end_think is None:
        raise InputError(f"{latent.name} knows no <think> token: train it with `llm-trm train lora`")
    return think, end_think


def _keep_completions(path: Path, until: int) -> None:
    """Drop what a run that was cut off wrote behind the checkpoint that it goes on from."""
    path.write_text(lines_until(path, until), encoding="utf-8")


def _plan(config: Phase3Config, trainer: LatentGRPOTrainer, problems: Problems, start: int) -> Phase3Plan:
    weights = list(trainer.model.parameters())
    trained = sum(weight.numel() for weight in weights if weight.requires_grad)
    return Phase3Plan(
        problems,
        (trained, sum(weight.numel() for weight in weights) - trained),
        _prompts(config, trainer.args),
        config.group_size,
        config.steps,
        start,
        f"{trainer.accelerator.num_processes} x {trainer.accelerator.device.type}",
    )


def _run(trainer: LatentGRPOTrainer, checkpoint: str | None) -> None:
    with no_bars(), warnings.catch_warnings():
        # What TRL and transformers deprecate in each other is nothing that a user could change.
        warnings.simplefilter("ignore", FutureWarning)
        if checkpoint is None or not take_up_finished(
            trainer, Path(checkpoint), Path(trainer.args.output_dir), best=False
        ):
            trainer.train(resume_from_checkpoint=checkpoint)
        state = trainer.state
        tested = [entry["step"] for entry in state.log_history if "eval_accuracy" in entry]
        if state.global_step not in tested:
            trainer.evaluate()


def _result(history: list[dict[str, Any]]) -> Phase3Result:
    tested = [entry for entry in history if "eval_accuracy" in entry]
    before, after = (
        Accuracy(round(entry["eval_correct"]), round(entry["eval_problems"]))
        for entry in (tested[0], tested[-1])
    )
    return Phase3Result(history, before, after)


class _Callback(TrainerCallback):
    """Hands on what the trainer says, on the main process."""

    def __init__(self, report: Phase3Report, accelerator: Accelerator) -> None:
        self._report, self._accelerator = report, accelerator

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self._report.step(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        logged = given["logs"]
        numbers = {name: value for name, value in logged.items() if isinstance(value, (int, float))}
        if "reward" not in numbers and "eval_accuracy" not in numbers:
            return
        self._accelerator.log(numbers, step=state.global_step)
        if state.is_world_process_zero:
            self._report.record({"step": state.global_step, **numbers})
