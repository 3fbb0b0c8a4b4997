"""``llm-trm train puzzle``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from llm_trm.choices import Task
from llm_trm.cli.options.settings import settings_options
from llm_trm.train.puzzle.config import Preset, PuzzleConfig, configure, preset_texts

if TYPE_CHECKING:
    from llm_trm.train.puzzle.report import PuzzleResult


@click.command(short_help="Train a recursion on Sudoku, mazes or ARC.")
@click.option("--task", type=click.Choice(get_args(Task)), help="Kind of puzzle. [default: that of --data]")
@click.option(
    "--preset",
    type=click.Choice(get_args(Preset)),
    default="tiny",
    show_default=True,
    help="paper: 5 to 7 million parameters and the official recipe, for a GPU. tiny: minutes on a CPU. The "
    "options below override single settings.",
)
@settings_options(PuzzleConfig, {"data": "data/TASK", "output": "runs/TASK"} | preset_texts())
def puzzle(task: Task | None, preset: Preset, given: dict[str, Any]) -> None:
    """Train a Tiny Recursive Model on puzzles, as in arXiv 2510.04871.

    A sample stays in flight for up to --max-steps supervision steps, each with a loss and an update. When its
    halting head predicts that it is solved, a new puzzle takes its place. Every --eval-every steps the
    averaged weights are evaluated on --eval-samples test puzzles, and a checkpoint is written. An interrupted
    run continues with --resume, on a CPU bit for bit.

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
    from llm_trm.train.puzzle.trainer import PuzzleTrainer
    from llm_trm.train.run.interruption import advising

    if task is None and "data" not in given:
        raise click.UsageError("give --task, or --data FOLDER")
    folder = given.setdefault("data", Path("data") / str(task))
    info = read_info(folder)
    if task is not None and info.task != task:
        raise InputError(
            f"{folder} contains {info.task} puzzles, not {task}: leave --task out, or name other --data"
        )
    given.setdefault("output", Path("runs") / info.task)
    config = configure(preset, info.task, **given)
    with advising(config), ConsoleReport() as report:
        result = PuzzleTrainer(config, report).train()
    _summarise(config.output, result)


def _summarise(output: Path, result: PuzzleResult) -> None:
    from llm_trm.cli.train.console import show_curves
    from llm_trm.train.puzzle.curves import plot_curves

    tested = [record for record in result.history if record["test"] is not None]
    if tested:
        best = max(tested, key=lambda record: record["test"]["exact"])
        click.echo(
            f"Best: step {best['step']}, {best['test']['exact']:.2%} of {best['test']['puzzles']} test "
            f"puzzles solved, after {best['seconds']:.0f} s of training."
        )
    click.echo(f"The model is in {result.best}.")
    show_curves(plot_curves, result.history, output)
    click.echo(
        f"Next: llm-trm eval puzzle --checkpoint {output}, or llm-trm solve --checkpoint {output} PUZZLE"
    )
