"""``llm-trm train puzzle``."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llm_trm.cli.options.device import resolve_device
from llm_trm.cli.options.types import (
    BATCH,
    CLIP_NORM,
    COUNT,
    DEPTH,
    FOLDER,
    LAYERS,
    LEARNING_RATE,
    NO_OR_COUNT,
    NO_OR_LENGTH,
    SEED,
    SHARE,
    SHARE_BELOW_ONE,
    WEIGHT,
    WIDTH,
)
from llm_trm.cli.train.options import run_options

if TYPE_CHECKING:
    from llm_trm.train.puzzle.report import PuzzleResult


@click.command(short_help="Train a recursion on Sudoku, mazes or ARC.")
@click.option(
    "--task",
    type=click.Choice(["sudoku", "maze", "arc"]),
    help="Kind of puzzle. [default: what --data holds]",
)
@click.option(
    "--preset",
    "preset_name",
    type=click.Choice(["paper", "tiny"]),
    default="tiny",
    show_default=True,
    help="paper: 5 to 7 million parameters and the official recipe, for a GPU. tiny: minutes on a CPU. The "
    "options below change single settings of it.",
)
@click.option("--data", type=FOLDER, help="Folder that llm-trm data wrote. [default: data/TASK]")
@click.option("-o", "--output", type=FOLDER, help="Folder of the run. [default: runs/TASK]")
@click.option("--steps", type=COUNT, help="Supervision steps, each with an update.")
@click.option("--batch-size", type=BATCH, help="Samples in flight.")
@click.option("--learning-rate", type=LEARNING_RATE, help="After the warm-up.")
@click.option("--warmup-steps", type=NO_OR_COUNT, help="Steps over which the learning rate rises.")
@click.option(
    "--schedule", type=click.Choice(["constant", "cosine"]), help="Of the learning rate behind the warm-up."
)
@click.option("--optimizer", type=click.Choice(["adamw", "adam-atan2"]), help="Of the parameters.")
@click.option("--weight-decay", type=WEIGHT, help="Decoupled, of the parameters.")
@click.option("--puzzle-learning-rate", type=LEARNING_RATE, help="Of the puzzle embeddings' sign-SGD.")
@click.option("--puzzle-weight-decay", type=WEIGHT, help="Of the puzzle embeddings.")
@click.option("--clip-norm", type=CLIP_NORM, help="Largest gradient norm.")
@click.option("--ema-decay", type=SHARE_BELOW_ONE, help="Of the average of the weights.")
@click.option(
    "--cell-loss", type=click.Choice(["stablemax", "softmax"]), help="How logits become probabilities."
)
@click.option("--exploration", type=SHARE, help="Share of samples that must go on for longer.")
@click.option("--d-model", type=WIDTH, help="Width.")
@click.option("--layers", "n_layers", type=LAYERS, help="Blocks of the network.")
@click.option("--heads", "n_heads", type=WIDTH, help="Attention heads.")
@click.option(
    "--mixer", type=click.Choice(["attention", "tokens"]), help="Attention, or an MLP over positions (mlp_t)."
)
@click.option("--positions", type=click.Choice(["rope", "learned", "none"]), help="Encoding of positions.")
@click.option("--puzzle-len", type=NO_OR_LENGTH, help="Positions in front, for the puzzle embedding.")
@click.option("--puzzle-dim", type=NO_OR_LENGTH, help="Numbers of a puzzle embedding; 0 for none.")
@click.option("-n", "--latent-steps", "n_latent_steps", type=DEPTH, help="Latent steps of a recursion.")
@click.option(
    "-T", "--deep-recursions", "n_deep_recursions", type=DEPTH, help="Recursions of a supervision step."
)
@click.option("--max-steps", type=DEPTH, help="Supervision steps of a sample at most.")
@click.option("--augment/--no-augment", default=True, show_default=True, help="Turn samples by symmetries.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "bf16", "fp32"]),
    default="auto",
    show_default=True,
    help="Of the residual stream; auto takes bf16 on CUDA, and fp32 elsewhere.",
)
@click.option(
    "--nograd-precision",
    type=click.Choice(["fp8"]),
    help="Run the recursions without gradient in fp8 (compute capability 9.0).",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of weights, order and augmentation.")
@click.option("--eval-every", type=COUNT, help="Steps between evaluations and checkpoints.")
@click.option(
    "--eval-samples",
    type=NO_OR_COUNT,
    default=512,
    show_default=True,
    help="Test puzzles of an evaluation; 0 for none. llm-trm eval puzzle takes all.",
)
@click.option("--save-every", type=COUNT, help="Steps between checkpoints, besides those of evaluations.")
@click.option("--keep", type=COUNT, default=3, show_default=True, help="Best checkpoints to keep.")
@click.option(
    "--log-every", type=COUNT, default=20, show_default=True, help="Steps between two logged metrics."
)
@run_options
def puzzle(
    task: str | None, preset_name: str, data: Path | None, output: Path | None, device: str, **options: Any
) -> None:
    """Train a Tiny Recursive Model on puzzles, as arXiv 2510.04871 does.

    A sample stays in flight for up to --max-steps supervision steps, each with a loss and an update, and
    leaves when its halting head says that it is solved; a new puzzle takes its place. Every --eval-every
    steps the averaged weights are evaluated on --eval-samples test puzzles and a checkpoint is written; the
    best three are kept. A run that was killed goes on with --resume, on a CPU bit for bit.

    \b
    On a CPU:
      llm-trm data sudoku --size 4
      llm-trm train puzzle --task sudoku
      llm-trm solve "1... ..3. .4.. ...2"

    \b
    The paper's Sudoku-Extreme, on a GPU:
      llm-trm data sudoku --dataset sapientinc/sudoku-extreme --subsample 1000
      llm-trm train puzzle --task sudoku --preset paper
      llm-trm eval puzzle --checkpoint runs/sudoku
    """
    from llm_trm.cli.train.puzzle_progress import ConsoleReport
    from llm_trm.data.puzzles.dataset import read_info
    from llm_trm.errors import InputError
    from llm_trm.train.puzzle.config import configure
    from llm_trm.train.puzzle.trainer import PuzzleTrainer

    if task is None and data is None:
        raise click.UsageError("give --task, or --data FOLDER")
    folder = data or Path("data") / str(task)
    info = read_info(folder)
    if task is not None and info.task != task:
        raise InputError(
            f"{folder} holds {info.task} puzzles, not {task}: leave --task out, or name other --data"
        )
    config = configure(
        preset_name,  # type: ignore[arg-type]
        info.task,
        data=folder,
        output=output or Path("runs") / info.task,
        device=resolve_device(device).type,
        **options,
    )
    with ConsoleReport() as report:
        result = PuzzleTrainer(config, report).train()
    _summarise(config.output, result)


def _summarise(output: Path, result: PuzzleResult) -> None:
    tested = [record for record in result.history if record["test"] is not None]
    if tested:
        best = max(tested, key=lambda record: record["test"]["exact"])
        click.echo(
            f"Best: step {best['step']}, {best['test']['exact']:.2%} of {best['test']['puzzles']} test "
            f"puzzles solved, after {best['seconds']:.0f} s of training."
        )
    click.echo(f"It is in {result.best}.")
    if importlib.util.find_spec("matplotlib") and result.history:
        from llm_trm.train.puzzle.curves import plot_curves

        plot_curves(result.history, output / "curves.png")
        click.echo(f"The curves are in {output / 'curves.png'}.")
    click.echo(
        f"Next: llm-trm eval puzzle --checkpoint {output}, or llm-trm solve --checkpoint {output} PUZZLE"
    )
