"""``llm-trm train phase3``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llm_trm.cli.options.language_model import DEFAULT_CHECKPOINT, chosen_checkpoint, memory_advice
from llm_trm.cli.options.settings import settings_options
from llm_trm.cli.options.world import refuse_world_options
from llm_trm.train.phase3.config import Phase3Config

if TYPE_CHECKING:
    from llm_trm.train.phase3.report import Accuracy, Phase3Result


@click.command(short_help="Train the recursion on rewards for right answers (GRPO).")
@settings_options(Phase3Config)
@click.pass_context
def phase3(context: click.Context, /, given: dict[str, Any]) -> None:
    """Train a language model's recursion by reinforcement learning: GRPO, with TRL's trainer.

    The model samples a group of answers to every problem, each after a recursion at <think>. Training makes
    answers with a reward above the group's mean more likely, and the others less likely. The reward is 1 for
    a right answer plus --format-weight for the right format. Only the recursion, its compressor and its
    projection are trained: the language model, its adapters and the halting head stay frozen, and all dropout
    is off. Greedy accuracy on held-out problems is measured during training; completions are written to
    completions.jsonl. Ctrl-C writes a checkpoint and stops.

    \b
    On the arithmetic world, on a CPU:
      llm-trm train lora --data questions.jsonl --trm runs/phase2
      llm-trm train phase3 --max-operand 2
    \b
    SmolLM3-3B on GPUs:
      llm-trm train phase3 --checkpoint runs/smollm3-lora --data gsm8k --max-new-tokens 64 \\
          --learning-rate 1e-5 --track wandb -o runs/smollm3-phase3
      accelerate launch --num_processes 8 --no_python llm-trm train phase3 ...
    \b
    Variants:
      llm-trm train phase3 --kl 0            no reference
      llm-trm train phase3 --think model     the model writes <think> itself
      llm-trm train phase3 --resume          continue from the last checkpoint
    """
    from llm_trm.extras import require

    config = Phase3Config(**given)
    refuse_world_options(context, config.data)
    if config.checkpoint == str(DEFAULT_CHECKPOINT):
        chosen_checkpoint(None, None)  # Otherwise the hub would be asked for a model of this name.
    require("train", "transformers", "accelerate", "datasets")
    require("rl", "trl")
    from llm_trm.cli.train.phase3_progress import ConsoleReport
    from llm_trm.data.processes import launched_processes
    from llm_trm.train.phase3.train import train_phase3
    from llm_trm.train.run.interruption import advising

    with memory_advice(), advising(config), ConsoleReport() as report:
        result = train_phase3(config, report)
    if launched_processes().is_main:
        _summarise(config.output, result)


def _summarise(output: Path, result: Phase3Result) -> None:
    from llm_trm.cli.train.console import show_curves
    from llm_trm.train.phase3.curves import plot_curves

    click.echo(f"Held-out accuracy: {_share(result.before)} before, {_share(result.after)} after.")
    click.echo(
        f"The model is in {output}; completions of the training are in {output / 'completions.jsonl'}."
    )
    show_curves(plot_curves, result.history, output)
    click.echo(f"Next: llm-trm eval lm --checkpoint {output}")


def _share(found: Accuracy) -> str:
    from llm_trm.evaluate.statistics import wilson

    low, high = wilson(found.correct, found.total)
    return f"{found.share:.1%} of {found.total} (95% interval {low:.1%} to {high:.1%})"
