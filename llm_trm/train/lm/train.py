"""Trains a language model from nothing on the arithmetic world, to think before it answers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from llm_trm.data.lessons import encode_prompt, question_prompt
from llm_trm.data.processes import world_size
from llm_trm.data.tags import END_THINK, THINK
from llm_trm.errors import InputError
from llm_trm.models.tiny import END, tiny_language_model, tiny_tokenizer
from llm_trm.train.lm.config import LanguageModelConfig

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
        # Prompts carry no label. An empty trace is prompt: a model that learned to write it would not think.
        asked = encode_prompt(self._tokenizer, prompt, "chat")
        said = self._tokenizer(f"{trace}{problem.answer}{END}", add_special_tokens=False)["input_ids"]
        return {"input_ids": asked + said, "labels": [_NO_LABEL] * len(asked) + said}


def train_language_model(config: LanguageModelConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Train, and save model and tokenizer in Hugging Face format in ``config.output``, weights in bfloat16.

    Returns:
        The model as it was saved (bfloat16 values, in float32) in eval mode, and its tokenizer.

    Raises:
        InputError: Nothing to resume, or a checkpoint that is not one.
    """
    world_size()
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    from llm_trm.train.lora.trainer import trainer_state

    checkpoint = None
    if config.resume:
        checkpoint = get_last_checkpoint(str(config.output)) if config.output.is_dir() else None
        if checkpoint is None:
            raise InputError(f"{config.output} holds no checkpoint to resume: leave --resume out")
        trainer_state(Path(checkpoint))
    tokenizer = tiny_tokenizer()
    model = tiny_language_model(tokenizer, config.preset, config.seed)
    arguments = TrainingArguments(
        output_dir=str(config.output),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, config.steps // 20),
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        seed=config.seed,
        use_cpu=config.device_type == "cpu",
        bf16=config.device_type == "cuda",
        logging_steps=25,
        save_steps=config.save_every,
        save_total_limit=2,
        report_to="none",
        dataloader_num_workers=0,
        remove_unused_columns=False,
    )
    padding_right = tiny_tokenizer()
    padding_right.padding_side = "right"
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Lessons(config, tokenizer),
        data_collator=DataCollatorForSeq2Seq(padding_right, padding=True, label_pad_token_id=_NO_LABEL),
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.accelerator.wait_for_everyone()
    trained: Any = trainer.accelerator.unwrap_model(trainer.model)
    trained = trained.to(torch.bfloat16)
    trained.config.use_cache = True  # Trainer turns it off
    if trainer.is_world_process_zero():
        trained.save_pretrained(config.output)
        tokenizer.save_pretrained(config.output)
    return trained.float().eval(), tokenizer
