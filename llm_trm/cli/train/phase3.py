"""``llm-trm train phase3``."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from llm_trm.cli.options.device import resolve_device
from llm_trm.cli.options.language_model import trust_option
from llm_trm.cli.options.types import (
    BATCH,
    CLIP_NORM,
    COUNT,
    FOLDER,
    GROUP,
    LEARNING_RATE,
    LENGTH,
    SPREAD,
    TRAINER_SEED,
    WEIGHT,
)
from llm_trm.cli.options.world import world_options
from llm_trm.cli.train.options import run_options

if TYPE_CHECKING:
    from llm_trm.train.phase3.config import Accuracy, Phase3Result

_CURVES = "curves.png"
_OF_ARITHMETIC = ("operations", "min_operations", "modulus", "max_operand")


@click.command(short_help="Reward right answers: GRPO on the recursion, the language model frozen.")
@click.option(
    "--checkpoint",
    default="runs/lora",
    show_default=True,
    help="Language model with a recursion: a folder that llm-trm train lora wrote, or a name on the hub.",
)
@click.option(
    "-o",
    "--output",
    type=FOLDER,
    default=Path("runs/phase3"),
    show_default=True,
    help="Folder of the trained model, its checkpoints and completions.",
)
@click.option(
    "--dataset",
    default="arithmetic",
    show_default=True,
    help="arithmetic, gsm8k, math, or a .jsonl or .json file with the columns question and answer. Held out "
    "is its test split, or its first problems if it has none.",
)
@world_options(fewest=1)
@click.option(
    "--think",
    type=click.Choice(["prompt", "model"]),
    default="prompt",
    show_default=True,
    help="Whether every prompt ends in <think>, or the model has to write it. What it writes before <think> "
    "cannot be trained here, as no recursion has come by then.",
)
@click.option(
    "--group-size",
    type=GROUP,
    default=8,
    show_default=True,
    help="Completions of a problem, whose rewards are compared.",
)
@click.option(
    "--batch-size",
    type=BATCH,
    default=64,
    show_default=True,
    help="Completions of one process at a time: a multiple of --group-size.",
)
@click.option("--gradient-accumulation", type=BATCH, default=1, show_default=True, help="Batches of a step.")
@click.option(
    "--kl",
    type=WEIGHT,
    default=0.1,
    show_default=True,
    help="Weight of the divergence from the model at the start; 0 leaves it out.",
)
@click.option(
    "--format-weight",
    type=WEIGHT,
    default=0.2,
    show_default=True,
    help="Weight of the format's reward, beside 1 for a right answer.",
)
@click.option("--steps", type=COUNT, default=200, show_default=True, help="Optimizer steps.")
@click.option(
    "--learning-rate",
    type=LEARNING_RATE,
    default=3e-5,
    show_default=True,
    help="Peak of warm-up and linear decay.",
)
@click.option("--clip-norm", type=CLIP_NORM, default=1.0, show_default=True, help="Largest gradient norm.")
@click.option(
    "--temperature", type=SPREAD, default=1.0, show_default=True, help="Of the completions in training."
)
@click.option(
    "--max-new-tokens", type=LENGTH, default=32, show_default=True, help="Longest completion, in tokens."
)
@click.option(
    "--gradient-checkpointing",
    is_flag=True,
    help="Compute activations of the language model twice instead of keeping them.",
)
@click.option("--eval-samples", type=COUNT, default=200, show_default=True, help="Held-out problems.")
@click.option(
    "--eval-every",
    type=COUNT,
    default=25,
    show_default=True,
    help="Steps between measurements of the greedy accuracy on them, besides one at either end.",
)
@click.option(
    "--log-every",
    type=COUNT,
    default=5,
    show_default=True,
    help="Steps between logged metrics, with the latest completions.",
)
@click.option(
    "--save-every",
    type=COUNT,
    default=50,
    show_default=True,
    help="Steps between checkpoints; the last three are kept.",
)
@click.option(
    "--seed", type=TRAINER_SEED, default=0, show_default=True, help="Of problems, order and completions."
)
@trust_option
@run_options
@click.pass_context
def phase3(context: click.Context, /, device: str, **options: Any) -> None:
    """Train a language model's recursion by reinforcement: GRPO, with TRL's trainer.

    For every problem the model samples a group of answers, each behind a recursion at <think>; those with a
    reward above the group's mean are made likelier, the others less likely. The reward is 1 for a right
    answer and --format-weight for the form. Only the recursion, its compressor and its projection are
    trained: the language model, its adapters and the halting head stay as they are, and all dropout is off.
    Greedy accuracy on held-out problems is measured on the way; completions are kept in completions.jsonl.

    \b
    On the arithmetic world, on a CPU:
      llm-trm train lora --trm runs/phase2
      llm-trm train phase3 --max-operand 2
    \b
    SmolLM3-3B on GPUs:
      llm-trm train phase3 --checkpoint runs/smollm3-lora --dataset gsm8k --max-new-tokens 64 \\
          --learning-rate 1e-5 --track wandb -o runs/smollm3-phase3
      accelerate launch --num_processes 8 --no_python llm-trm train phase3 ...
    \b
    Variants:
      llm-trm train phase3 --kl 0            no reference
      llm-trm train phase3 --think model     the model writes <think> itself
      llm-trm train phase3 --resume          go on after a crash
    """
    from llm_trm.cli.options.language_model import DEFAULT_CHECKPOINT, chosen_checkpoint, memory_advice
    from llm_trm.extras import require

    if options["dataset"] != "arithmetic":
        for name in _OF_ARITHMETIC:
            if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                raise click.UsageError(
                    f"--{name.replace('_', '-')} is of --dataset arithmetic, and this is "
                    f"{options['dataset']}: leave it out"
                )
    if options["checkpoint"] == str(DEFAULT_CHECKPOINT):
        # Otherwise the hub would be asked for a model of this name.
        options["checkpoint"] = chosen_checkpoint(None, None)
    require("train", "transformers", "accelerate", "datasets")
    require("rl", "trl")
    from llm_trm.cli.train.phase3_progress import ConsoleReport
    from llm_trm.data.arithmetic import World
    from llm_trm.data.processes import launched_processes
    from llm_trm.train.phase3.config import Phase3Config
    from llm_trm.train.phase3.train import train_phase3

    most, fewest, modulus, operand = (options.pop(name) for name in _OF_ARITHMETIC)
    world = World(fewest, most, modulus, operand)
    config = Phase3Config(device=resolve_device(device).type, world=world, **options)
    with memory_advice():
        result = train_phase3(config, ConsoleReport())
    if launched_processes().is_main:
        _summarise(config.output, result)


def _summarise(output: Path, result: Phase3Result) -> None:
    from llm_trm.train.phase3.curves import plot_curves

    click.echo(f"Held-out accuracy: {_share(result.before)} before, {_share(result.after)} after.")
    click.echo(f"The model is in {output}; what it wrote on the way in {output / 'completions.jsonl'}.")
    if importlib.util.find_spec("matplotlib"):
        plot_curves(result.history, output / _CURVES)
        click.echo(f"The curves are in {output / _CURVES}.")
    click.echo(f"Next: llm-trm eval lm --checkpoint {output}")


def _share(found: Accuracy) -> str:
    from llm_trm.evaluate.statistics import wilson

    low, high = wilson(found.correct, found.total)
    return f"{found.share:.1%} of {found.total} (95% interval {low:.1%} to {high:.1%})"
