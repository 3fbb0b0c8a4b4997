"""``llm-trm train lora``."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llm_trm.cli.options.device import resolve_device
from llm_trm.cli.options.language_model import trust_option
from llm_trm.cli.options.types import (
    ADAPTER_RANK,
    BATCH,
    CLIP_NORM,
    COUNT,
    DEPTH,
    EPOCHS,
    FOLDER,
    HELD_OUT,
    LAYERS,
    LEARNING_RATE,
    LENGTH,
    NO_OR_COUNT,
    NO_OR_DEPTH,
    SHARE_BELOW_ONE,
    TRAINER_SEED,
    WEIGHT,
    WIDTH,
)
from llm_trm.cli.train.options import run_options

if TYPE_CHECKING:
    from llm_trm.train.lora.config import LoraTrainingConfig
    from llm_trm.train.lora.train import LoraResult

_CURVES = "curves.png"
#: Options that go to the configuration of the reasoner, and their names there.
_OF_REASONER = {
    "reasoner": "reasoner",
    "num_latents": "num_latents",
    "d_compressed": "d_compressed",
    "soft_tokens": "soft_tokens",
    "layers": "n_layers",
    "heads": "n_heads",
    "latent_steps": "n_latent_steps",
    "deep_recursions": "n_deep_recursions",
    "supervision_steps": "supervision_steps",
    "dropout": "dropout",
    "halting": "halting",
    "halt_weight": "halting_loss_weight",
    "window": "window",
}


@click.command(short_help="Teach a language model to recur at <think> and answer.")
@click.option(
    "--data",
    required=True,
    help="Questions and answers: a .jsonl file, a .json file with a list, gsm8k, math, or a data set on the "
    "hub (owner/name, or owner/name:configuration).",
)
@click.option("--val-data", help="Hold these out instead of a part of --data.")
@click.option(
    "--val-fraction",
    type=HELD_OUT,
    default=0.05,
    show_default=True,
    help="Share of the different questions that is held out.",
)
@click.option(
    "--eval-samples",
    type=COUNT,
    default=500,
    show_default=True,
    help="Held-out questions of an evaluation, at most.",
)
@click.option(
    "--model",
    default="arithmetic",
    show_default=True,
    help="Language model: arithmetic, a folder, or a name on the hub.",
)
@click.option(
    "-o",
    "--output",
    type=FOLDER,
    default=Path("runs/lora"),
    show_default=True,
    help="Folder of the model, and of the run's checkpoints.",
)
@click.option("--trm", type=FOLDER, help="Begin with the recursion that llm-trm train phase2 wrote here.")
@click.option(
    "--reasoner",
    type=click.Choice(["latents", "sequence"]),
    help="Latents at full width, or one reasoning state at a smaller one. [default: latents; sequence with "
    "--trm]",
)
@click.option("--num-latents", type=LENGTH, help="Latents M. [default: 256; 8 for models narrower than 512]")
@click.option(
    "--d-compressed",
    type=WIDTH,
    help="Width D' of a sequence reasoner. [default: 256; a quarter of models of up to 256]",
)
@click.option("--soft-tokens", type=DEPTH, help="Soft tokens K of a sequence reasoner. [default: 1]")
@click.option("--layers", type=LAYERS, help="Blocks of the recursion's network. [default: 2]")
@click.option(
    "--heads", type=WIDTH, help="Attention heads. [default: 8, or as many fewer as leave each 8 dimensions]"
)
@click.option("-n", "--latent-steps", type=DEPTH, help="Latent steps of a recursion. [default: 6]")
@click.option("-T", "--deep-recursions", type=DEPTH, help="Recursions of a supervision step. [default: 3]")
@click.option("--supervision-steps", type=DEPTH, help="Supervision steps, at most. [default: 8]")
@click.option("--dropout", type=SHARE_BELOW_ONE, help="Of the recursion's attention weights. [default: 0]")
@click.option(
    "--halting",
    type=click.Choice(["sample", "batch", "none"]),
    help="Whose confidence ends a recursion. [default: sample]",
)
@click.option("--halt-weight", type=WEIGHT, help="Weight of the halting head's loss. [default: 0.1]")
@click.option(
    "--window",
    type=click.Choice(["slide", "always"]),
    help="always: each recursion drops as many of the oldest positions as it adds. [default: slide]",
)
@click.option("--lora/--no-lora", default=True, show_default=True, help="Adapters on q, k, v and o.")
@click.option("--lora-r", type=ADAPTER_RANK, default=16, show_default=True, help="Rank of the adapters.")
@click.option("--lora-alpha", type=WIDTH, default=32, show_default=True, help="Their scale, times the rank.")
@click.option(
    "--lora-dropout",
    type=SHARE_BELOW_ONE,
    default=0.1,
    show_default=True,
    help="Of what they read; 0 saves a sixth of the time on a CPU.",
)
@click.option("--merge", is_flag=True, help="Fold the adapters into the weights at the end.")
@click.option(
    "--prompt-form",
    type=click.Choice(["chat", "plain"]),
    help="plain: Question: ... Answer: <think> ... [default: chat where the tokenizer has a template]",
)
@click.option(
    "--whole-answers", is_flag=True, help="Learn to write what stands before #### in an answer, too."
)
@click.option(
    "--curriculum",
    type=NO_OR_DEPTH,
    default=0,
    show_default=True,
    help="Stages, in the first half of the training, that take written thinking away step by step (Coconut).",
)
@click.option(
    "--distill",
    type=WEIGHT,
    default=0.0,
    show_default=True,
    help="Weight of the distance to hidden states of the run with written thinking (CODI).",
)
@click.option("--epochs", type=EPOCHS, default=3.0, show_default=True, help="Passes over the data.")
@click.option("--steps", type=COUNT, help="Updates, instead of --epochs.")
@click.option(
    "--batch-size", type=BATCH, default=16, show_default=True, help="Samples a batch, of one process."
)
@click.option("--accumulation", type=BATCH, default=1, show_default=True, help="Batches an update.")
@click.option(
    "--learning-rate",
    type=LEARNING_RATE,
    default=2e-4,
    show_default=True,
    help="Peak of warm-up and linear decay.",
)
@click.option(
    "--trm-learning-rate",
    type=LEARNING_RATE,
    help="That of the recursion and its compressor. [default: a tenth with --trm, the same otherwise]",
)
@click.option(
    "--warmup-ratio",
    type=SHARE_BELOW_ONE,
    default=0.1,
    show_default=True,
    help="Share of the updates with a rising rate.",
)
@click.option("--weight-decay", type=WEIGHT, default=0.01, show_default=True, help="Of AdamW.")
@click.option("--clip-norm", type=CLIP_NORM, default=1.0, show_default=True, help="Largest gradient norm.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "bf16", "fp32"]),
    default="auto",
    show_default=True,
    help="bf16 is autocast over a decoder in bfloat16; auto takes it on CUDA, and fp32 elsewhere.",
)
@click.option(
    "--gradient-checkpointing", is_flag=True, help="Less memory: compute the decoder's activations twice."
)
@click.option("--max-length", type=LENGTH, help="Leave longer questions out, in tokens with their answers.")
@click.option(
    "--eval-every",
    type=COUNT,
    default=100,
    show_default=True,
    help="Updates between evaluations, each with a checkpoint.",
)
@click.option(
    "--patience",
    type=NO_OR_COUNT,
    default=3,
    show_default=True,
    help="Stop after so many evaluations without a lower loss; 0 for never.",
)
@click.option(
    "--keep", type=COUNT, default=3, show_default=True, help="Best checkpoints to keep, besides the last."
)
@click.option(
    "--log-every", type=COUNT, default=10, show_default=True, help="Updates between logged metrics."
)
@click.option(
    "--seed", type=TRAINER_SEED, default=0, show_default=True, help="Of weights, held-out part and order."
)
@trust_option
@run_options
def lora(device: str, **options: Any) -> None:
    """Teach a language model to write <think>, recur there in latent space, and answer.

    The language model stays as it is but for small adapters (LoRA) on its attention; the recursion, its
    compressor and the projection into the language model are trained with them. What is learned is to write
    <think> and the answer: written thinking that the data holds (a column thinking, or what stands before
    ####) is what the recursion replaces. Rows with "think": false teach to answer at once. Each evaluation on
    held-out questions says how often the model writes <think> by itself, and how many answers are right,
    token by token; the best model ends up in --output.

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
      llm-trm train lora --data gsm8k --curriculum 3    written thinking goes step by step
      llm-trm train lora --data gsm8k --distill 1       hidden states of the run with written thinking teach
      llm-trm train lora --data gsm8k --resume          go on after a crash
      accelerate launch --num_processes 8 --no_python llm-trm train lora ...    on 8 GPUs
    """
    from llm_trm.extras import require

    require("train", "transformers", "accelerate")
    from llm_trm.cli.train.lora_progress import ConsoleReport
    from llm_trm.train.lora.config import LoraTrainingConfig
    from llm_trm.train.lora.train import train_lora

    asked = {name: options.pop(option) for option, name in _OF_REASONER.items()}
    config = LoraTrainingConfig(
        device=resolve_device(device).type,
        reasoner={name: value for name, value in asked.items() if value is not None},
        **options,
    )
    with ConsoleReport() as report:
        result = train_lora(config, report)
    if result.main:
        _summarise(_unseen(config), result)


def _summarise(data: str, result: LoraResult) -> None:
    from llm_trm.cli.train.lora_progress import held_out
    from llm_trm.train.lora.curves import plot_curves

    if result.stopped_early:
        click.echo(f"Stopped early: no lower loss after update {result.best_step}.")
    click.echo(f"Best: update {result.best_step}; {held_out(result.metrics)}; {result.seconds:.0f} s in all.")
    if importlib.util.find_spec("matplotlib"):
        plot_curves(result.history, result.output / _CURVES)
        click.echo(f"The curves are in {result.output / _CURVES}.")
    click.echo(
        f"The model is in {result.output}. Next: llm-trm eval lm --checkpoint {result.output} --data {data}"
    )


def _unseen(config: LoraTrainingConfig) -> str:
    """What ``eval lm`` is to read: no questions that the model was trained on."""
    from llm_trm.data.problems import HUB

    held_out = config.val_data if config.val_data is not None else config.data
    if held_out in HUB or (config.val_data is not None and held_out.endswith((".jsonl", ".json"))):
        return held_out
    return "FILE, of questions that it was not trained on"
