"""Phase 3: GRPO on task reward, the language model frozen, its recursion trained. Needs the extra ``rl``."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

from llm_trm.claims import claimed
from llm_trm.data.lessons import encode_each, opens_thought, question_prompt
from llm_trm.data.problems import Question, located
from llm_trm.data.processes import main_process
from llm_trm.data.tags import THINK
from llm_trm.errors import InputError
from llm_trm.extras import require
from llm_trm.files import write_text
from llm_trm.models.causal.loading import LatentModel
from llm_trm.models.loading import no_bars
from llm_trm.train.phase3.config import Phase3Config
from llm_trm.train.phase3.inputs import Inputs, Problems, read_inputs
from llm_trm.train.phase3.report import Accuracy, Phase3Plan, Phase3Result
from llm_trm.train.phase3.rewards import correctness_reward, format_reward
from llm_trm.train.run.report import Report
from llm_trm.train.run.tracking import lines_until
from llm_trm.train.run.trainer import TrainerRun, count_parameters

require("rl", "trl")

from trl.trainer.grpo_config import GRPOConfig  # noqa: E402

from llm_trm.evaluate.language_model_modes import end_tokens  # noqa: E402
from llm_trm.train.phase3.arguments import grpo_arguments  # noqa: E402
from llm_trm.train.phase3.trainer import COMPLETIONS_FILE, LatentGRPOTrainer  # noqa: E402


def train_phase3(config: Phase3Config, report: Report | None = None) -> Phase3Result:
    """Train the reasoner of ``config.checkpoint``, and write the model to ``config.output``.

    Raises:
        InputError: Settings that do not fit together, no such model, too few problems, a folder in use,
            nothing to resume.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was written.
    """
    with claimed(config.output, main=main_process()):
        return _train(config, report)


def _train(config: Phase3Config, report: Report | None) -> Phase3Result:
    arguments = grpo_arguments(config)
    run = TrainerRun(config, report, keep_last=3, sources=(config.checkpoint,))
    prompts = (arguments.generation_batch_size or 0) // config.group_size
    inputs = read_inputs(config, run, prompts, arguments.device)
    trainer = make_trainer(config, arguments, inputs.latent, inputs.problems)
    if trainer.is_world_process_zero():
        _keep_completions(config.output / COMPLETIONS_FILE, run.start_step)
    run.start(trainer, functools.partial(_plan, inputs, trainer))
    with warnings.catch_warnings():
        # Users cannot change what TRL and transformers deprecate in each other.
        warnings.simplefilter("ignore", FutureWarning)
        run.train()
        run.stop_if_interrupted()
        with no_bars():
            _finish(config, trainer)
    run.finish()
    return _result(trainer.state.log_history)


def make_trainer(
    config: Phase3Config, arguments: GRPOConfig, latent: LatentModel, problems: Problems
) -> LatentGRPOTrainer:
    """The trainer of a run, which has not started."""
    from datasets import Dataset

    tokenizer, form = latent.tokenizer, latent.prompt_form
    graded = tokenizer, form, _tags(latent), end_tokens(latent.model, tokenizer)
    rewards = [correctness_reward(*graded), format_reward(*graded)]
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
        # The tag apart: a tokenizer may join it with the text before it.
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

    return LatentGRPOTrainer(
        latent,
        rewards,
        arguments,
        rows(problems.training),
        rows(problems.held_out),
        # Metrics of the older weights are left out.
        {name: fact for name, fact in latent.facts.items() if name not in ("held_out", "held_out_loss")},
        encoded,
    )


def _tags(latent: LatentModel) -> tuple[int, int]:
    """Ids of ``<think>`` and ``</think>``."""
    think, end_think = latent.config.think_token_id, latent.config.end_think_token_id
    if think is None or end_think is None:
        raise InputError(f"{latent.name} has no <think> token: train it with `llm-trm train lora`")
    return think, end_think


def _keep_completions(path: Path, until: int) -> None:
    """Drop completions that an interrupted run wrote after the checkpoint that it continues from."""
    write_text(path, lines_until(path, until))


def _plan(inputs: Inputs, trainer: LatentGRPOTrainer, steps: int, start: int) -> Phase3Plan:
    trained, parameters = count_parameters(trainer.model)
    return Phase3Plan(
        steps=steps,
        start=start,
        training=len(inputs.problems.training),
        held_out=len(inputs.problems.held_out),
        dropped=inputs.problems.dropped,
        trained=trained,
        frozen=parameters - trained,
        prompts=inputs.prompts,
        group_size=trainer.args.num_generations,
        device=f"{trainer.accelerator.num_processes} x {trainer.accelerator.device.type}",
    )


def _finish(config: Phase3Config, trainer: LatentGRPOTrainer) -> None:
    """Evaluate the last step unless that is done, and write the model."""
    history = trainer.state.log_history
    if not any("eval_accuracy" in entry and entry["step"] == trainer.state.global_step for entry in history):
        trainer.evaluate()
    result = _result(trainer.state.log_history)
    trainer.facts |= {
        "phase3_steps": config.steps,
        "phase3_accuracy_before": round(result.before.share, 4),
        "phase3_accuracy_after": round(result.after.share, 4),
        "phase3": {**config.record(), "data": located(config.data)},
    }
    trainer.save_model(str(config.output))


def _result(history: list[dict[str, Any]]) -> Phase3Result:
    evaluations = [entry for entry in history if "eval_accuracy" in entry]
    before, after = (
        Accuracy(round(entry["eval_correct"]), round(entry["eval_problems"]))
        for entry in (evaluations[0], evaluations[-1])
    )
    return Phase3Result(history, before, after)
