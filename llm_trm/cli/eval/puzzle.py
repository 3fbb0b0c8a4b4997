"""``llm-trm eval puzzle``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llm_trm.choices import DeviceName
from llm_trm.cli.bars import progress_bar
from llm_trm.cli.options.attempts import Attempts, max_steps
from llm_trm.cli.options.new_files import require_new_files
from llm_trm.cli.options.settings import settings_options
from llm_trm.cli.tables import new_table, table_console, with_interval
from llm_trm.device import resolve_device
from llm_trm.ranges import BATCH, COUNT, SEED, SHARE_BELOW_ONE
from llm_trm.settings import Settings, setting
from llm_trm.shared_settings import device, output_file, overwrite

if TYPE_CHECKING:
    from rich.table import Table

    from llm_trm.data.puzzles.arc_folder import ArcKey
    from llm_trm.data.puzzles.dataset import PuzzleInfo, PuzzleSplit
    from llm_trm.evaluate.puzzle_modes import ModeResult


@dataclass(frozen=True)
class EvalPuzzleSettings(Settings):
    """Options of ``llm-trm eval puzzle``."""

    checkpoint: Path = setting(
        ..., "Folder of a run, whose best checkpoint is used, a single checkpoint, or an imported model."
    )
    data: Path | None = setting(
        None, "Folder of puzzles whose test split is used.", unset="the one that the model was trained on"
    )
    num_samples: int | None = setting(
        None,
        "Number of test puzzles, or ARC tasks, drawn at random.",
        COUNT,
        was=("--samples",),
        unset="all",
    )
    batch_size: int = setting(128, "Puzzles per batch.", BATCH)
    max_steps: int | None = max_steps()
    halting: bool | None = setting(
        None,
        "Stop each puzzle when the model considers it solved, or always take all steps.",
        unset="both, to compare them",
    )
    halt_threshold: float = setting(
        0.5, "Halting probability above which a puzzle stops; higher is safer, and slower.", SHARE_BELOW_ONE
    )
    attempts: Attempts = field(default_factory=Attempts)
    output: Path | None = output_file("JSON file for the results.", was=("--json",))
    overwrite: bool = overwrite()
    seed: int = setting(0, "Seed for the noise and for --num-samples.", SEED)
    device: DeviceName = device()


@click.command(short_help="Measure how many test puzzles a model solves, and how fast.")
@settings_options(EvalPuzzleSettings, config_file=False)
def puzzle(given: dict[str, Any]) -> None:
    """Measure a model on the test puzzles of a folder.

    A puzzle is solved if every cell is right. Unless --halting or --no-halting is given, all puzzles are
    solved twice: with all steps, and with halting as soon as the halting head is confident. The copies of an
    ARC task under all its symmetries vote for two attempts.

    \b
    Examples:
      llm-trm eval puzzle --checkpoint runs/sudoku
      llm-trm eval puzzle --checkpoint runs/sudoku --num-samples 1000 --max-steps 64
      llm-trm eval puzzle --checkpoint runs/sudoku --halting --tries 8 -o results.json
    """
    from llm_trm.data.puzzles.arc_vote import ArcBallot
    from llm_trm.data.puzzles.dataset import read_info
    from llm_trm.evaluate.puzzle_data import check_puzzles
    from llm_trm.evaluate.puzzle_modes import Mode, evaluate_mode, require_fitting
    from llm_trm.models.puzzle.loading import load_puzzle

    asked = EvalPuzzleSettings(**given)
    require_new_files({"--output": asked.output}, overwrite=asked.overwrite)
    where = resolve_device(asked.device)
    model, facts = load_puzzle(asked.checkpoint)
    folder = _data_folder(asked.checkpoint, asked.data, facts)
    info = read_info(folder)
    require_fitting(model, facts, info, folder)
    split, key = _test_puzzles(folder, info, asked.num_samples, asked.seed)
    if note := check_puzzles(model, facts, folder, split):
        click.echo(note, err=True)
    model, split = model.to(where), split.to(where)
    steps = asked.max_steps or model.config.max_steps
    modes = [
        Mode(halting, steps, asked.attempts.tries, asked.attempts.deviation, asked.halt_threshold)
        for halting in ((False, True) if asked.halting is None else (asked.halting,))
    ]
    results = []
    for mode in modes:
        with progress_bar(mode.name, len(split)) as progress:
            ballot = None if key is None else ArcBallot(key)
            results.append(
                evaluate_mode(
                    model, split, mode, asked.batch_size, seed=asked.seed, ballot=ballot, progress=progress
                )
            )
    speedup = results[0].seconds / results[1].seconds if len(results) == 2 else None
    if asked.output is not None:
        from llm_trm.benchmark.environment import run_record
        from llm_trm.files import write_json

        about = {
            "checkpoint": str(asked.checkpoint),
            "data": str(folder),
            "puzzles": len(split),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "batch_size": asked.batch_size,
            "seed": asked.seed,
        }
        modes_json = [result.to_json() for result in results]
        write_json(asked.output, run_record(where) | about | {"modes": modes_json, "speedup": speedup})
    console = table_console()
    title = f"{folder}: {len(split)} {info.task} puzzles of {info.rows}x{info.columns}, at most {steps} steps"
    console.print(_table(title, results))
    console.print("\n".join(_remarks(results, speedup)), soft_wrap=True)


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
    """The puzzles to evaluate on, and the key of ARC puzzles."""
    from llm_trm.data.puzzles.dataset import read_split
    from llm_trm.errors import InputError
    from llm_trm.evaluate.arc import draw_tasks, read_key
    from llm_trm.evaluate.puzzle import draw_puzzles, with_answers

    split = with_answers(read_split(folder, "test"))
    if not len(split):
        raise InputError(f"{folder} contains no test puzzles with answers: name others with --data")
    if info.task != "arc":
        return (split if samples is None else draw_puzzles(split, samples, seed)), None
    key = read_key(folder, split)
    if samples is not None:
        key, split = draw_tasks(key, split, samples, seed)
    return split, key


def _table(title: str, results: Sequence[ModeResult]) -> Table:
    headers = ["exact [95%]", "cells", "steps", "halted", "halting right", "ms per puzzle"]
    if results[0].arc is not None:
        headers.append("two attempts")
    table = new_table(title, "mode", headers)
    for result in results:
        score = result.score
        row = [
            result.mode.name,
            with_interval(score.exact, result.interval, 2),
            f"{score.cells:.2%}",
            f"{score.steps:.2f}",
            f"{score.halted:.1%}",
            f"{score.halt_right:.1%}",
            f"{1000 * result.seconds:.3g}",
        ]
        table.add_row(*row, *([f"{result.arc.tasks:.2%}"] if result.arc is not None else []))
    return table


def _remarks(results: Sequence[ModeResult], speedup: float | None) -> list[str]:
    """What the columns mean, and what halting saves."""
    tries = results[0].mode.tries
    lines = [
        "exact: puzzles without a wrong cell; cells: right cells; steps: supervision steps per puzzle"
        + (f", the sum of {tries} tries" if tries > 1 else "")
        + "; halted: the halting head considers the answer right; halting right: its judgement is right."
    ]
    if (arc := results[0].arc) is not None:
        lines.append(
            "two attempts: the copies of a task under all symmetries vote for two answers to each test; the "
            "mean over tasks of the fraction of tests with a right answer among the two "
            f"({arc.scored} tests)."
        )
    if speedup is not None:
        without, halted = (result.score.exact for result in results)
        lines.append(
            f"Halting: {speedup:.2f} times as fast; exact accuracy {halted:.2%} with it, "
            f"{without:.2%} without."
        )
    return lines
