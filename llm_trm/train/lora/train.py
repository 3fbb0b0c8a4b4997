"""Trains a language model to recur at ``<think>`` and answer, with adapters on its attention."""

from __future__ import annotations

import functools
import logging
import time
import warnings
from collections.abc import Sequence
from typing import Any

from transformers import TrainingArguments

from llm_trm.claims import claimed
from llm_trm.data.problems import located
from llm_trm.data.processes import main_process
from llm_trm.errors import InputError
from llm_trm.models.causal.loading import clear_model, save_latent_model
from llm_trm.models.loading import language_model_source, no_bars
from llm_trm.train.lora.callbacks import KeepBest, WriteFacts, eval_losses
from llm_trm.train.lora.config import LoraTrainingConfig
from llm_trm.train.lora.curriculum import StagedOrder
from llm_trm.train.lora.data import Collator
from llm_trm.train.lora.inputs import Inputs, read_inputs
from llm_trm.train.lora.model import Trainee
from llm_trm.train.lora.report import LoraPlan, LoraResult
from llm_trm.train.lora.trainer import LatentTrainer
from llm_trm.train.run.report import Report
from llm_trm.train.run.trainer import TrainerRun, count_parameters, training_arguments
from llm_trm.upstream import checkpointing_option

_logger = logging.getLogger(__name__)

#: Fraction of the updates in which a curriculum changes the task.
_CHANGING = 0.5


def train_lora(config: LoraTrainingConfig, report: Report | None = None) -> LoraResult:
    """Train, and write the best model to ``config.output`` for ``load_latent_model``.

    Raises:
        InputError: Data, a model or a folder that cannot be used or is in use, or nothing to resume.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was written.
    """
    with claimed(config.output, main=main_process()):
        return _train(config, report)


def _train(config: LoraTrainingConfig, report: Report | None) -> LoraResult:
    run = TrainerRun(config, report, sources=(language_model_source(config.model), config.trm))
    keeper = KeepBest(config.keep, config.patience, _CHANGING if config.curriculum else 0.0)
    if run.state and keeper.exhausted(run.state["log_history"], run.state["max_steps"]):
        raise InputError(
            f"{config.output} ended early, after {config.patience} evaluations without a lower loss: raise "
            "--patience to go on"
        )
    inputs = read_inputs(config, run)
    trainer = _trainer(config, inputs, keeper)
    run.start(trainer, functools.partial(_plan, inputs))
    began = time.monotonic()
    with warnings.catch_warnings():
        # torch warns of bfloat16 states and a norm in float32, which are intended.
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight", UserWarning)
        run.train(best=True)
    if not keeper.stopped:  # a run that patience ended cannot be resumed
        run.stop_if_interrupted()
    seconds = time.monotonic() - began
    history = list(trainer.state.log_history)
    metrics = _best(history)
    with no_bars():
        _save(config, inputs.trainee, trainer, metrics)
    run.finish()
    return LoraResult(
        output=config.output,
        best_step=int(metrics["step"]),
        metrics=metrics,
        history=history,
        stopped_early=keeper.stopped,
        seconds=seconds,
    )


def _trainer(config: LoraTrainingConfig, inputs: Inputs, keeper: KeepBest) -> LatentTrainer:
    trainee = inputs.trainee
    return LatentTrainer(
        order=StagedOrder(len(inputs.training), config.curriculum, config.seed),
        distill=config.distill,
        recursion_rate=config.recursion_rate,
        think=trainee.model.config.think_token_id,
        model=trainee.model,
        args=_arguments(config),
        train_dataset=inputs.training,
        eval_dataset=inputs.held_out,
        data_collator=Collator(trainee.tokenizer.pad_token_id),
        callbacks=[keeper, WriteFacts(config, trainee)],
    )


def _arguments(config: LoraTrainingConfig) -> TrainingArguments:
    checkpointing = checkpointing_option()
    options: dict[str, Any] = {
        checkpointing: config.gradient_checkpointing,
        f"{checkpointing}_kwargs": {"use_reentrant": False} if config.gradient_checkpointing else None,
    }
    return training_arguments(
        TrainingArguments,
        config,
        num_train_epochs=config.epochs,
        max_steps=-1 if config.steps is None else config.steps,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        lr_scheduler_type="linear",
        warmup_steps=config.warmup_ratio,
        weight_decay=config.weight_decay,
        max_grad_norm=config.clip_norm,
        bf16=config.bf16,
        eval_strategy="steps",
        eval_steps=config.eval_every,
        save_strategy="steps",
        save_steps=config.eval_every,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,
        # With a <think> in every process or in none, all trained weights take part in every loss.
        ddp_find_unused_parameters=False,
        **options,
    )


def _plan(inputs: Inputs, steps: int, start: int) -> LoraPlan:
    trainee = inputs.trainee
    trainable, parameters = count_parameters(trainee.model)
    return LoraPlan(
        steps=steps,
        start=start,
        training=len(inputs.training),
        held_out=len(inputs.held_out),
        left_out=inputs.left_out,
        shared=inputs.shared,
        thinking=inputs.training.thinking,
        trainable=trainable,
        parameters=parameters,
        reasoner=_reasoner(trainee.model.config),
        form=trainee.form,
        added=trainee.added,
    )


def _reasoner(config: Any) -> str:
    if config.reasoner == "latents":
        size = f"{config.num_latents} latents"
    else:
        size = f"D' = {config.d_compressed}, soft tokens: {config.soft_tokens}"
    return (
        f"{config.reasoner} ({size}; {config.n_latent_steps} latent steps, {config.n_deep_recursions} deep "
        f"recursions, {config.supervision_steps} supervision steps)"
    )


def _best(history: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The evaluation with the lowest loss, its names without ``eval_``."""
    losses = eval_losses(history)
    best = min(losses, key=lambda step: losses[step])
    entry = next(entry for entry in history if "eval_loss" in entry and entry["step"] == best)
    return {name.removeprefix("eval_"): value for name, value in entry.items()}


def _save(
    config: LoraTrainingConfig, trainee: Trainee, trainer: LatentTrainer, metrics: dict[str, float]
) -> None:
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    # Every process takes part in gathering sharded weights.
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded else None
    if not trainer.is_world_process_zero():
        return
    if config.merge and sharded:
        _logger.warning("weights are sharded over processes: the adapters are written without merging them")
    # A resumed run may have written adapters first and merge them now, or the other way round.
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
