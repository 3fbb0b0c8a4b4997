"""``llm-trm train phase2``."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llm_trm.cli.options.device import resolve_device
from llm_trm.cli.options.types import (
    BATCH,
    CLIP_NORM,
    COSINE,
    COUNT,
    DEPTH,
    FOLDER,
    HELD_OUT,
    LAYERS,
    LEARNING_RATE,
    SEED,
    SHARE_BELOW_ONE,
    WEIGHT,
    WIDTH,
)
from llm_trm.cli.train.options import run_options

if TYPE_CHECKING:
    from llm_trm.train.phase2.report import Phase2Result

_CURVES = "curves.png"


@click.command(short_help="Train a recursion from the states before thinking to the one after.")
@click.option(
    "--data",
    type=FOLDER,
    default=Path("data/pairs"),
    show_default=True,
    help="Pairs that llm-trm datagen wrote.",
)
@click.option(
    "--compressor",
    type=FOLDER,
    default=Path("runs/phase1"),
    show_default=True,
    help="Compressor that llm-trm train phase1 wrote.",
)
@click.option(
    "-o",
    "--output",
    type=FOLDER,
    default=Path("runs/phase2"),
    show_default=True,
    help="Folder of the run: checkpoints, settings, curves.",
)
@click.option(
    "--val-fraction",
    type=HELD_OUT,
    default=0.05,
    show_default=True,
    help="Share of the pairs that is held out.",
)
@click.option("--val-data", type=FOLDER, help="Hold out these pairs instead.")
@click.option(
    "--layers", "n_layers", type=LAYERS, default=2, show_default=True, help="Blocks of the network."
)
@click.option(
    "--heads",
    "n_heads",
    type=WIDTH,
    help="Attention heads. [default: 8, or as many fewer as leave each 8 dimensions]",
)
@click.option(
    "-n",
    "--latent-steps",
    "n_latent_steps",
    type=DEPTH,
    default=6,
    show_default=True,
    help="Latent steps of a recursion.",
)
@click.option(
    "-T",
    "--deep-recursions",
    "n_deep_recursions",
    type=DEPTH,
    default=3,
    show_default=True,
    help="Recursions of a supervision step; the last one has gradients.",
)
@click.option(
    "--dropout",
    type=SHARE_BELOW_ONE,
    default=0.0,
    show_default=True,
    help="Of attention weights (the original: 0.1).",
)
@click.option(
    "--supervision-steps",
    type=DEPTH,
    default=8,
    show_default=True,
    help="Supervision steps a batch, and at most at inference.",
)
@click.option(
    "--steps-per-update",
    type=DEPTH,
    default=1,
    show_default=True,
    help="Supervision steps whose gradients one update averages; as many as --supervision-steps for a single "
    "update a batch.",
)
@click.option(
    "--halt-loss",
    type=click.Choice(["mse", "bce", "none"]),
    default="mse",
    show_default=True,
    help="The halting head learns the cosine similarity (mse), or whether it is above a threshold (bce).",
)
@click.option(
    "--halt-weight",
    type=WEIGHT,
    default=0.5,
    show_default=True,
    help="Weight of the halting loss.",
)
@click.option(
    "--halt-threshold",
    type=COSINE,
    default=0.7,
    show_default=True,
    help="Threshold of bce in the first epoch.",
)
@click.option(
    "--adaptive-threshold/--no-adaptive-threshold",
    default=True,
    show_default=True,
    help="Afterwards 0.95 x the mean cosine similarity of the epoch before.",
)
@click.option(
    "--halt-in-training",
    type=click.Choice(["sample", "batch", "none"]),
    default="none",
    show_default=True,
    help="Let confident samples leave a batch early: each for itself, or all by their mean.",
)
@click.option(
    "--batch-size", type=BATCH, default=32, show_default=True, help="Samples a batch, of one process."
)
@click.option("--epochs", type=COUNT, default=100, show_default=True, help="Passes over the data.")
@click.option(
    "--learning-rate",
    type=LEARNING_RATE,
    default=1e-4,
    show_default=True,
    help="Peak of warm-up and cosine.",
)
@click.option(
    "--warmup-ratio",
    type=SHARE_BELOW_ONE,
    default=0.1,
    show_default=True,
    help="Share of the updates with a rising rate.",
)
@click.option("--weight-decay", type=WEIGHT, default=0.1, show_default=True, help="Of AdamW.")
@click.option("--clip-norm", type=CLIP_NORM, default=1.0, show_default=True, help="Largest gradient norm.")
@click.option(
    "--ema-decay",
    type=SHARE_BELOW_ONE,
    default=0.999,
    show_default=True,
    help="Of the average of the weights, which is validated and used.",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "bf16", "fp32"]),
    default="auto",
    show_default=True,
    help="bf16 is autocast; auto takes it on CUDA, and fp32 elsewhere.",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of weights, held-out part and order.")
@click.option("--patience", type=COUNT, help="Stop after so many epochs without a lower validation loss.")
@click.option("--keep", type=COUNT, default=3, show_default=True, help="Best checkpoints to keep.")
@click.option("--save-every", type=COUNT, help="Batches between checkpoints, besides one each epoch.")
@click.option(
    "--log-every", type=COUNT, default=10, show_default=True, help="Batches between two logged metrics."
)
@run_options
def phase2(device: str, **options: Any) -> None:
    """Train a SequenceTRM to lead, by recursion, from a context to the state after thinking.

    The states before <think> are compressed by the frozen compressor, a reasoning token is appended, and the
    recursion refines it, supervision step by supervision step, towards the compressed state at </think>.
    Each step has its own loss and update. A halting head learns how good the state is, so that at inference
    every sample stops when it is content. Each epoch ends with a validation of the averaged weights on
    held-out pairs and a checkpoint; a run that was killed goes on with --resume as if nothing had happened,
    on a CPU bit for bit.

    \b
    On the arithmetic world, on a CPU:
      llm-trm train phase1 -o runs/phase1
      llm-trm datagen --min-operations 1 --operations 3 --max-operand 2 --num-samples 10000
      llm-trm train phase2 -n 2 -T 1 --supervision-steps 2 --batch-size 128 --learning-rate 4e-3 --epochs 30

    \b
    SmolLM3-3B on a GPU, as the original did:
      llm-trm train phase1 --model HuggingFaceTB/SmolLM3-3B -o runs/smollm3-phase1
      llm-trm datagen --model HuggingFaceTB/SmolLM3-3B --dataset gsm8k -o data/smollm3-gsm8k
      llm-trm train phase2 --data data/smollm3-gsm8k --compressor runs/smollm3-phase1 \\
          -o runs/smollm3-phase2 --patience 10 --track wandb

    \b
    Variants:
      llm-trm train phase2 --steps-per-update 8    one update a batch
      llm-trm train phase2 --halt-loss bce         halt above a threshold that follows the training
      llm-trm train phase2 --resume                go on after a crash
      accelerate launch --num_processes 8 --no_python llm-trm train phase2 ...    on 8 GPUs
    """
    from llm_trm.extras import require

    require("train", "accelerate")
    from llm_trm.cli.train.phase2_progress import ConsoleReport
    from llm_trm.train.phase2.config import Phase2Config
    from llm_trm.train.phase2.trainer import TRMSequenceTrainer

    config = Phase2Config(device=resolve_device(device).type, **options)
    with ConsoleReport() as report:
        trainer = TRMSequenceTrainer(config, report)
        result = trainer.train()
    if trainer.accelerator.is_main_process:
        _summarise(config.output, result)


def _summarise(output: Path, result: Phase2Result) -> None:
    from llm_trm.train.phase2.curves import plot_curves
    from llm_trm.train.phase2.report import best_record

    best = result.history[best_record(result.history)]
    held_out = best["validation"]
    if result.stopped_early:
        click.echo(f"Stopped early: no lower validation loss after epoch {best['epoch']}.")
    if result.skipped:
        click.echo(f"{result.skipped} updates were skipped, as their gradients were not finite.")
    click.echo(
        f"Best: epoch {best['epoch']}, held-out mse {held_out['mse']:.6f}, cosine {held_out['cosine']:.4f}, "
        f"relative error {held_out['relative_error']:.4f}; halting sample by sample: cosine "
        f"{held_out['halted_cosine']:.4f} after {held_out['halt_steps']:.2f} steps."
    )
    click.echo(f"It is in {result.best}.")
    if importlib.util.find_spec("matplotlib"):
        plot_curves(result.history, output / _CURVES)
        click.echo(f"The curves are in {output / _CURVES}.")
    click.echo(f"Next: llm-trm eval phase2 --checkpoint {output} --data HELD_OUT_PAIRS")
