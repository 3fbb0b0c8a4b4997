"""TRL's settings for a run of phase 3; needs the extra ``rl``."""

from __future__ import annotations

from typing import Any

from trl.trainer.grpo_config import GRPOConfig

from llm_trm.errors import InputError
from llm_trm.evaluate.language_model_modes import UNPENALISED
from llm_trm.train.phase3.config import Phase3Config
from llm_trm.train.run.trainer import training_arguments
from llm_trm.upstream import checkpointing_option

#: Of AdamW. Where all completions are right, the gradient that is left is the rounding errors of the
#: divergence, 1e-8 per element, compared with 1e-4 in a step that teaches; 1e-8 would turn them into full
#: steps.
_EPSILON = 1e-6


def grpo_arguments(config: Phase3Config) -> GRPOConfig:
    """TRL's settings for a run.

    Raises:
        InputError: A batch that is not made of whole groups of at least 2 completions.
    """
    if config.group_size < 2:
        raise InputError("--group-size must be at least 2: GRPO compares completions of one problem")
    # The old name of the argument draws a warning, and the default of TRL is True.
    checkpointing: dict[str, Any] = {checkpointing_option(): config.gradient_checkpointing}
    try:
        return training_arguments(
            GRPOConfig,
            config,
            max_steps=config.steps,
            per_device_eval_batch_size=config.batch_size,
            gradient_accumulation_steps=config.accumulation,
            num_generations=config.group_size,
            num_generations_eval=1,
            beta=config.kl,
            reward_weights=[1.0, _round(config.format_weight)],
            lr_scheduler_type="linear",
            warmup_steps=max(1, config.steps // 20),
            weight_decay=0.0,
            adam_epsilon=_EPSILON,
            max_grad_norm=config.clip_norm,
            temperature=config.temperature,
            max_completion_length=config.max_new_tokens,
            # Completions and their training pass are computed in one precision, that of the weights.
            bf16=False,
            generation_kwargs={"min_p": 0.0, **UNPENALISED},
            **checkpointing,
            eval_strategy="steps",
            eval_steps=config.eval_every,
            eval_on_start=not config.resume,
            save_steps=config.save_every,
            use_cache=True,  # Otherwise Trainer turns it off in the model's config, which is saved.
        )
    except ValueError as error:
        if "divisible" not in str(error):
            raise
        raise InputError(
            f"--batch-size {config.batch_size} (of each process, times --accumulation "
            f"{config.accumulation}) is not a multiple of --group-size {config.group_size}: a step "
            "consists of whole groups"
        ) from error


def _round(weight: float) -> float:
    """To a multiple of 1/1024, so that equal rewards have a mean that is equal to them.

    TRL divides by their standard deviation plus 1e-4: rounding errors would become advantages of 1e-3, and
    AdamW makes full steps of any gradient. Three steps without a wrong answer took a model from 64 right of
    64 to 62.
    """
    return round(1024 * weight) / 1024
