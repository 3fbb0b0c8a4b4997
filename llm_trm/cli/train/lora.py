"""``llm-trm train lora``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from llm_trm.cli.options.settings import settings_options
from llm_trm.train.lora.config import LoraTrainingConfig

if TYPE_CHECKING:
    from llm_trm.train.lora.report import LoraResult


@click.command(short_help="Teach a language model to recur at <think> and answer.")
@settings_options(LoraTrainingConfig)
def lora(given: dict[str, Any]) -> None:
    """Teach a language model to write <think>, recur there in latent space, and answer.

    The language model stays frozen except for small adapters (LoRA) on its attention. They are trained
    together with the recursion, its compressor and the projection into the language model. The model learns
    to write <think> and the answer; the recursion replaces the written thinking in the data (a column
    thinking, or the text before ####). Rows with "think": false teach it to answer at once. Each evaluation
    on held-out questions measures how often the model writes <think> by itself, and how many answers are
    right in every token. The best model is written to --output. Ctrl-C writes a checkpoint and stops.

    \b
    On the arithmetic world, on a CPU:
      llm-trm data arithmetic -o problems.jsonl
      llm-trm train lora --data problems.jsonl
      llm-trm train lora --data problems.jsonl --trm runs/phase2 --batch-size 128 --learning-rate 1e-3

    \b
    SmolLM3-3B on a GPU:
      llm-trm train lora --model HuggingFaceTB/SmolLM3-3B --data gsm8k --accumulation 2 \\
          --gradient-checkpointing --track wandb -o runs/smollm3-lora

    \b
    Variants:
      llm-trm train lora --data gsm8k --curriculum 3    remove written thinking step by step
      llm-trm train lora --data gsm8k --distill 1       learn hidden states of a pass with written thinking
      llm-trm train lora --data gsm8k --resume          continue from the last checkpoint
      accelerate launch --num_processes 8 --no_python llm-trm train lora ...    on 8 GPUs
    """
    from llm_trm.extras import require

    require("train", "transformers", "accelerate")
    from llm_trm.cli.train.lora_progress import ConsoleReport
    from llm_trm.data.processes import launched_processes
    from llm_trm.train.lora.train import train_lora
    from llm_trm.train.run.interruption import advising

    config = LoraTrainingConfig(**given)
    with advising(config), ConsoleReport() as report:
        result = train_lora(config, report)
    if launched_processes().is_main:
        _summarise(_unseen(config), result)


def _summarise(data: str, result: LoraResult) -> None:
    from llm_trm.cli.train.console import show_curves
    from llm_trm.cli.train.lora_progress import held_out
    from llm_trm.train.lora.curves import plot_curves

    if result.stopped_early:
        click.echo(f"Stopped early: no lower loss after update {result.best_step}.")
    click.echo(f"Best: update {result.best_step}; {held_out(result.metrics)}; {result.seconds:.0f} s in all.")
    show_curves(plot_curves, result.history, result.output)
    click.echo(
        f"The model is in {result.output}. Next: llm-trm eval lm --checkpoint {result.output} --data {data}"
    )


def _unseen(config: LoraTrainingConfig) -> str:
    """The data to name for ``eval lm``: questions that the model was not trained on."""
    from llm_trm.data.problems import HUB, is_file

    held_out = config.val_data if config.val_data is not None else config.data
    if held_out in HUB or (config.val_data is not None and is_file(held_out)):
        return held_out
    return "FILE (questions that it was not trained on)"
