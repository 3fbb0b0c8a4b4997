"""Trains a language model from scratch on the arithmetic world, to think before it answers."""

from __future__ import annotations

import functools
import random
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from llm_trm.claims import claimed
from llm_trm.data.lessons import encode_prompt, question_prompt
from llm_trm.data.processes import main_process
from llm_trm.data.tags import END_THINK, THINK
from llm_trm.models.loading import no_bars
from llm_trm.models.tiny import END, tiny_language_model, tiny_tokenizer
from llm_trm.train.lm.config import LanguageModelConfig
from llm_trm.train.lm.report import LanguageModelPlan
from llm_trm.train.run.report import Report
from llm_trm.train.run.trainer import TrainerRun, count_parameters, training_arguments
from llm_trm.train.run.trainer_checkpoints import StrictTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Label of tokens that the model is not to learn to write (the value that cross entropy ignores).
_NO_LABEL = -100


class Lessons(Dataset[dict[str, list[int]]]):
    """Token sequences of solved problems; sample i is a function of the seed and i alone."""

    def __init__(self, config: LanguageModelConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._config, self._tokenizer = config, tokenizer

    def __len__(self) -> int:
        return self._config.steps * self._config.batch_size

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        config = self._config
        problem = config.world.problem("train", config.seed, index)
        thinks = random.Random(f"thinks/{config.seed}/{index}").random() < config.thinking_share
        prompt = question_prompt(self._tokenizer, problem.question, "chat", thinking=thinks, recurs=False)
        trace = f"{THINK}{problem.thinking}{END_THINK}" if thinks else ""
        # Prompts have no labels. An empty trace is prompt: a model that learned to write it would not think.
        asked = encode_prompt(self._tokenizer, prompt, "chat")
        said = self._tokenizer(f"{trace}{problem.answer}{END}", add_special_tokens=False)["input_ids"]
        return {"input_ids": asked + said, "labels": [_NO_LABEL] * len(asked) + said}


def train_language_model(
    config: LanguageModelConfig, report: Report | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Train, and save model and tokenizer in Hugging Face format in ``config.output``, weights in bfloat16.

    Returns:
        The model as it was saved (bfloat16 values, in float32) in eval mode, and its tokenizer.

    Raises:
        InputError: A folder that contains a run, cannot be written or is in use, nothing to resume, or other
            settings.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was written.
    """
    with claimed(config.output, main=main_process()):
        return _train(config, report)


def _train(
    config: LanguageModelConfig, report: Report | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    run = TrainerRun(config, report, model_file="config.json", keep_last=2)
    trainer, tokenizer = _trainer(config)
    run.start(trainer, functools.partial(_plan, trainer))
    run.train()
    run.stop_if_interrupted()
    trained: Any = trainer.accelerator.unwrap_model(trainer.model)
    trained = trained.to(torch.bfloat16)
    trained.config.use_cache = True  # Trainer turns it off
    if trainer.is_world_process_zero():
        with no_bars():
            trained.save_pretrained(config.output)
        tokenizer.save_pretrained(config.output)
    run.finish()
    return trained.float().eval(), tokenizer


def _trainer(config: LanguageModelConfig) -> tuple[Trainer, PreTrainedTokenizerBase]:
    tokenizer = tiny_tokenizer()
    arguments = training_arguments(
        TrainingArguments,
        config,
        max_steps=config.steps,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, config.steps // 20),
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=config.device_type == "cuda",
        save_steps=config.save_every,
    )
    padding_right = tiny_tokenizer()
    padding_right.padding_side = "right"
    trainer = StrictTrainer(
        model=tiny_language_model(tokenizer, config.preset, config.seed),
        args=arguments,
        train_dataset=Lessons(config, tokenizer),
        data_collator=DataCollatorForSeq2Seq(padding_right, padding=True, label_pad_token_id=_NO_LABEL),
    )
    return trainer, tokenizer


def _plan(trainer: Trainer, steps: int, start: int) -> LanguageModelPlan:
    processes = trainer.accelerator.num_processes
    return LanguageModelPlan(
        steps=steps,
        start=start,
        parameters=count_parameters(trainer.model)[1],
        batch_size=processes * trainer.args.per_device_train_batch_size,
        device=f"{processes} x {trainer.accelerator.device.type}",
    )
