"""``llm-trm train lm``."""

from __future__ import annotations

from typing import Any

import click

from llm_trm.cli.options.settings import settings_options
from llm_trm.train.lm.config import LanguageModelConfig


@click.command(short_help="Train a tiny language model that thinks before it answers.")
@settings_options(LanguageModelConfig)
def lm(given: dict[str, Any]) -> None:
    """Train a SmolLM3-architecture language model of 0.8 M parameters on the arithmetic world.

    The model learns to write a worked trace between <think> and </think> and then the answer; samples with an
    empty trace teach it to answer at once. At the end, both modes are measured on held-out problems. The
    bundled model (`--model arithmetic` of other commands) was trained by this command with its defaults.
    Ctrl-C writes a checkpoint and stops.

    \b
    Examples:
      llm-trm train lm                             train the bundled model again, into runs/lm
      llm-trm train lm --operations 3 --steps 600  train on easier problems
      llm-trm train lm --resume                    continue from the last checkpoint
      llm-trm datagen --model runs/lm              write its states before and after thinking
    """
    from llm_trm.extras import require

    require("train", "transformers", "accelerate")
    from llm_trm.cli.train.lm_progress import ConsoleReport
    from llm_trm.data.problems import require_problems
    from llm_trm.data.processes import launched_processes
    from llm_trm.memory import require_memory
    from llm_trm.train.lm.train import train_language_model
    from llm_trm.train.run.interruption import advising

    config = LanguageModelConfig(**given)
    # The problems at the end, and the order of all samples, which is drawn at once.
    require_problems(config.eval_samples)
    samples = config.steps * config.batch_size
    require_memory(8 * samples, f"{samples:,} samples", "choose fewer --steps")
    with advising(config), ConsoleReport() as report:
        model, tokenizer = train_language_model(config, report)
    if launched_processes().is_main:
        _summarise(config, model, tokenizer)


def _summarise(config: LanguageModelConfig, model: Any, tokenizer: Any) -> None:
    from dataclasses import replace

    from llm_trm.evaluate.answers import accuracy

    hardest = replace(config.world, min_operations=config.world.max_operations)
    problems = list(hardest.problems(config.eval_samples, "test", config.seed))
    longest = max(len(problem.thinking) for problem in problems)
    click.echo(f"{config.eval_samples} held-out problems of {hardest.max_operations} operations:")
    for thinking in (True, False):
        found = accuracy(
            model, tokenizer, problems, thinking=thinking, max_new_tokens=longest + 16 if thinking else 16
        )
        label = "with thinking" if thinking else "without"
        click.echo(f"  {label:<14} {found.share:7.1%}  {found.generated:5.1f} tokens written")
    click.echo(f"The model is in {config.output}. Next: llm-trm datagen --model {config.output}")
