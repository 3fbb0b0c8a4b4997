"""``llm-trm eval puzzle``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llm_trm.cli.options.device import device_option
from llm_trm.cli.options.output import output_file
from llm_trm.cli.options.tries import noise_of, tries_options
from llm_trm.cli.options.types import BATCH, COUNT, DEPTH, FOLDER, SEED, SHARE_BELOW_ONE
from llm_trm.device import resolve_device

if TYPE_CHECKING:
    from rich.table import Table

    from llm_trm.data.puzzles.arc_folder import ArcKey
    from llm_trm.data.puzzles.dataset import PuzzleInfo, PuzzleSplit
    from llm_trm.evaluate.puzzle_modes import ModeResult


@click.command(short_help="Measure how many test puzzles a model solves, and how fast.")
@click.option(
    "--checkpoint",
    type=FOLDER,
    required=True,
    help="Folder of a run, whose best checkpoint is taken, a single checkpoint, or an imported model.",
)
@click.option(
    "--data",
    type=FOLDER,
    help="Folder whose test puzzles are taken. [default: the one that the model was trained on]",
)
@click.option(
    "--samples", type=COUNT, help="Take so many test puzzles, or ARC tasks, drawn at random. [default: all]"
)
@click.option("--batch-size", type=BATCH, default=128, show_default=True, help="Puzzles at a time.")
@click.option(
    "--inference-steps",
    type=DEPTH,
    help="Supervision steps at most; may be more than in training. [default: as many as in training]",
)
@click.option(
    "--halting/--no-halting",
    default=None,
    help="Stop a puzzle once the model holds it for solved, or never before the last step. [default: both, "
    "to see what halting saves]",
)
@click.option(
    "--halt-threshold",
    type=SHARE_BELOW_ONE,
    default=0.5,
    show_default=True,
    help="Halting probability above which a puzzle stops; higher is surer, and slower.",
)
@tries_options
@click.option(
    "--json",
    "output",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=output_file,
    metavar="FILE",
    help="JSON file for the figures.",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the noise, and of --samples.")
@device_option
def puzzle(
    checkpoint: Path,
    data: Path | None,
    samples: int | None,
    batch_size: int,
    inference_steps: int | None,
    halting: bool | None,
    halt_threshold: float,
    tries: int,
    noise: float | None,
    output: Path | None,
    seed: int,
    device: str,
) -> None:
    """Measure a model on the test puzzles of a folder.

    A puzzle is solved if every cell is right. Unless one of --halting and --no-halting is given, all puzzles
    are solved twice: each for all steps, and each until its halting head says that it is done. The copies of
    an ARC task, under all its symmetries, vote for two attempts.

    \b
    Examples:
      llm-trm eval puzzle --checkpoint runs/sudoku
      llm-trm eval puzzle --checkpoint runs/sudoku --samples 1000 --inference-steps 64
      llm-trm eval puzzle --checkpoint runs/sudoku --halting --tries 8 --json figures.json
    """
    from rich.console import Console

    from llm_trm.cli.bars import progress_bar
    from llm_trm.data.puzzles.arc_vote import ArcBallot
    from llm_trm.data.puzzles.dataset import read_info
    from llm_trm.evaluate.puzzle_data import check_puzzles
    from llm_trm.evaluate.puzzle_modes import Mode, evaluate_mode, require_fitting
    from llm_trm.models.puzzle.loading import load_puzzle

    noise_used = noise_of(tries, noise)
    where = resolve_device(device)
    model, facts = load_puzzle(checkpoint)
    folder = _data_folder(checkpoint, data, facts)
    info = read_info(folder)
    require_fitting(model, facts, info, folder)
    split, key = _test_puzzles(folder, info, samples, seed)
    if note := check_puzzles(model, facts, folder, split):
        click.echo(note, err=True)
    model, split = model.to(where), split.to(where)
    steps = inference_steps or model.config.max_steps
    modes = [
        Mode(chosen, steps, tries, noise_used, halt_threshold)
        for chosen in ((False, True) if halting is None else (halting,))
    ]
    results = []
    for mode in modes:
        with progress_bar(mode.name, len(split)) as progress:
            ballot = None if key is None else ArcBallot(key)
            results.append(
                evaluate_mode(model, split, mode, batch_size, seed=seed, ballot=ballot, progress=progress)
            )
    speedup = results[0].seconds / results[1].seconds if len(results) == 2 else None
    if output is not None:
        from llm_trm.benchmark.environment import run_record
        from llm_trm.files import write_json

        about = {
            "checkpoint": str(checkpoint),
            "data": str(folder),
            "puzzles": len(split),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "batch_size": batch_size,
            "seed": seed,
        }
        modes_json = [result.to_json() for result in results]
        write_json(output, run_record(where) | about | {"modes": modes_json, "speedup": speedup})
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(width=160, highlight=False)  # a pipe has no width
    title = f"{folder}: {len(split)} {info.task} puzzles of {info.rows}x{info.columns}, at most {steps} steps"
    console.print(_table(title, results))
    console.print("\n".join(_words(results, speedup)), soft_wrap=True)


def _data_folder(checkpoint: Path, data: Path | None, facts: dict[str, Any]) -> Path:
    if data is not None:
        return data
    if not facts.get("data"):
        raise click.UsageError(f"{checkpoint} does not say what it was trained on: name puzzles with --data")
    folder = Path(facts["data"])
    if not folder.exists():
        raise click.UsageError(
            f"{checkpoint} was trained on {folder}, which is not there: name puzzles with --data"
        )
    return folder


def _test_puzzles(
    folder: Path, info: PuzzleInfo, samples: int | None, seed: int
) -> tuple[PuzzleSplit, ArcKey | None]:
    """Those to evaluate on, and the key of ARC's."""
    from llm_trm.data.puzzles.dataset import read_split
    from llm_trm.errors import InputError
    from llm_trm.evaluate.arc import draw_tasks, read_key
    from llm_trm.evaluate.puzzle import draw_puzzles, with_answers

    split = with_answers(read_split(folder, "test"))
    if not len(split):
        raise InputError(f"{folder} holds no test puzzles with answers: name others with --data")
    if info.task != "arc":
        return (split if samples is None else draw_puzzles(split, samples, seed)), None
    key = read_key(folder, split)
    if samples is not None:
        key, split = draw_tasks(key, split, samples, seed)
    return split, key


def _table(title: str, results: Sequence[ModeResult]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left")
    table.add_column("mode")
    for header in ("exact [95%]", "cells", "steps", "halted", "halting right", "ms a puzzle"):
        # A backslash keeps rich from reading the brackets as markup.
        table.add_column(header.replace("[", "\\["), justify="right", no_wrap=True)
    if results[0].arc is not None:
        table.add_column("two attempts", justify="right", no_wrap=True)
    for result in results:
        score, (low, high) = result.score, result.interval
        row = [
            result.mode.name,
            f"{score.exact:.2%} \\[{100 * low:.2f}, {100 * high:.2f}]",
            f"{score.cells:.2%}",
            f"{score.steps:.2f}",
            f"{score.halted:.1%}",
            f"{score.halt_right:.1%}",
            f"{1000 * result.seconds:.3g}",
        ]
        table.add_row(*row, *([f"{result.arc.tasks:.2%}"] if result.arc is not None else []))
    return table


def _words(results: Sequence[ModeResult], speedup: float | None) -> list[str]:
    """What the columns mean, and what halting is worth."""
    tries = results[0].mode.tries
    lines = [
        "exact: puzzles without a wrong cell; cells: right cells; steps: supervision steps of a puzzle"
        + (f", in {tries} tries together" if tries > 1 else "")
        + "; halted: the halting head holds the answer for right; halting right: it judges rightly."
    ]
    if (arc := results[0].arc) is not None:
        lines.append(
            "two attempts: a task's copies under all symmetries vote for two answers to each test; mean over "
            f"tasks of the share of tests where one of the two is right ({arc.scored} tests)."
        )
    if speedup is not None:
        without, halted = (result.score.exact for result in results)
        lines.append(
            f"Halting: {speedup:.2f} times as fast; exact accuracy {halted:.2%} with it, "
            f"{without:.2%} without."
        )
    return lines
