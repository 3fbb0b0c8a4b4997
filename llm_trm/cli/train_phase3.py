"""``llm-trm train phase3``."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from llm_trm.cli.device import resolve_device
from llm_trm.cli.language_model_options import trust_option
from llm_trm.cli.run_options import run_options
from llm_trm.cli.types import (
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
from llm_trm.cli.world_options import world_options

if TYPE_CHECKING:
    from llm_trm.train.phase3_config import Accuracy, Phase3Report, Phase3Result

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
    from llm_trm.cli.language_model_options import DEFAULT_CHECKPOINT, chosen_checkpoint, memory_advice
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
    from llm_trm.data.arithmetic import World
    from llm_trm.data.processes import launched_processes
    from llm_trm.train.phase3 import train_phase3
    from llm_trm.train.phase3_config import Phase3Config

    most, fewest, modulus, operand = (options.pop(name) for name in _OF_ARITHMETIC)
    world = World(fewest, most, modulus, operand)
    config = Phase3Config(device=resolve_device(device).type, world=world, **options)
    with memory_advice():
        result = train_phase3(config, _console_report())
    if launched_processes().is_main:
        _summarise(config.output, result)


def _summarise(output: Path, result: Phase3Result) -> None:
    from llm_trm.train.phase3_curves import plot_curves

    click.echo(f"Held-out accuracy: {_share(result.before)} before, {_share(result.after)} after.")
    click.echo(f"The model is in {output}; what it wrote on the way in {output / 'completions.jsonl'}.")
    if importlib.util.find_spec("matplotlib"):
        plot_curves(result.history, output / _CURVES)
        click.echo(f"The curves are in {output / _CURVES}.")
    click.echo(f"Next: llm-trm eval lm --checkpoint {output}")


def _share(found: Accuracy) -> str:
    from llm_trm.evaluate.phase2 import wilson

    low, high = wilson(found.correct, found.total)
    return f"{found.share:.1%} of {found.total} (95% interval {low:.1%} to {high:.1%})"


def _console_report() -> Phase3Report:
    from rich.console import Console

    from llm_trm.cli.bars import training_bar
    from llm_trm.train.phase3_config import Phase3Plan, Phase3Report

    class ConsoleReport(Phase3Report):
        """A line a measurement on stdout, and on a terminal a bar on stderr, renewed with every step."""

        def __init__(self) -> None:
            self._bar = training_bar()
            self._console = (
                Console(highlight=False, soft_wrap=True) if self._bar.disable else self._bar.console
            )

        def begin(self, plan: Phase3Plan) -> None:
            problems, (trained, frozen) = plan.problems, plan.parameters
            self._console.print(
                f"{len(problems.training)} problems to train on, {len(problems.held_out)} held out; "
                f"{trained:,} parameters trained, {frozen:,} frozen; {plan.steps} steps of {plan.prompts} "
                f"problems x {plan.group_size} completions; {plan.device}"
            )
            if problems.dropped:
                self._console.print(f"{problems.dropped} problems left out: no answer that can be graded")
            if plan.start:
                self._console.print(f"resuming at step {plan.start + 1}")
            self._task = self._bar.add_task("", total=plan.steps, completed=plan.start, numbers="")
            self._bar.start()

        def step(self, step: int) -> None:
            self._bar.update(self._task, completed=step)

        def record(self, record: Mapping[str, Any]) -> None:
            if "eval_accuracy" in record:
                self._console.print(
                    f"step {record['step']:>5}  held out: {record['eval_accuracy']:.1%} right, "
                    f"{record['eval_format']:.1%} of the form, {record['eval_tokens']:.1f} tokens"
                )
                return
            divergence = f"  kl {record['kl']:.4f}" if "kl" in record else ""
            self._console.print(
                f"step {record['step']:>5}  reward {record['reward']:.3f}  right "
                f"{record['rewards/correctness/mean']:.1%}  of the form {record['rewards/format/mean']:.1%}"
                f"{divergence}  gradient {record.get('grad_norm', 0.0):.3f}  "
                f"{record['completions/mean_length']:.1f} tokens  {1000 * record['step_time']:.0f} ms"
            )

        def end(self) -> None:
            self._bar.stop()

    return ConsoleReport()
