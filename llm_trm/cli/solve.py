"""``llm-trm solve``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llm_trm.choices import DeviceName
from llm_trm.cli.options.attempts import Attempts, max_steps
from llm_trm.cli.options.new_files import require_new_files
from llm_trm.cli.options.settings import settings_options
from llm_trm.cli.text_input import read_input
from llm_trm.device import resolve_device
from llm_trm.ranges import DELAY, SEED
from llm_trm.settings import Settings, setting
from llm_trm.shared_settings import device, output_file, overwrite

if TYPE_CHECKING:
    from llm_trm.evaluate.solving import Attempt


@dataclass(frozen=True)
class SolveSettings(Settings):
    """Options of ``llm-trm solve``."""

    input: Path | None = setting(
        None, "Text file of puzzles; - is standard input.", was=("--file",), metavar="FILE", file="read"
    )
    checkpoint: Path | None = setting(
        None,
        "Folder of a run, whose best checkpoint is used, a single checkpoint, or an imported model.",
        unset="runs/sudoku or runs/maze",
    )
    max_steps: int | None = max_steps()
    attempts: Attempts = field(default_factory=Attempts)
    seed: int = setting(0, "Seed for the noise.", SEED)
    gif: Path | None = output_file("Also write an animation of the steps; for a single puzzle.", "--gif")
    overwrite: bool = overwrite("Replace the file of --gif if it exists.")
    delay: float = setting(0.4, "Seconds per step on a terminal and in the animation.", DELAY)
    device: DeviceName = device()


@click.command(short_help="Solve a Sudoku or a maze, and show every step.")
@click.argument("puzzle", required=False)
@settings_options(SolveSettings, config_file=False)
@click.pass_context
def solve(context: click.Context, /, puzzle: str | None, given: dict[str, Any]) -> None:
    """Solve PUZZLE with a trained model, step by step.

    PUZZLE is a Sudoku of 16, 36 or 81 cells, row by row: digits, and any of 0 . _ - * for blanks; spaces,
    line breaks, the lines of a drawing and what follows a # are ignored. Or it is a maze with one row per
    line: # is a wall, a space is open, S is the start and G the goal. A file contains Sudokus, each on one
    line or with one line per row, or mazes that are separated by empty lines.

    The model stops when its halting head considers the answer right. The rules and the clues then decide
    whether it is valid. The exit code is 0 if every answer is valid, and 1 otherwise.

    \b
    Examples:
      llm-trm solve "1... ..3. .4.. ...2"
      llm-trm solve --input puzzles.txt --tries 8
      llm-trm solve "1... ..3. .4.. ...2" --gif solved.gif
      llm-trm solve --input maze.txt
    """
    asked = SolveSettings(**given)
    if (puzzle is None) == (asked.input is None):
        raise click.UsageError("give a PUZZLE, or a file of puzzles with --input")
    require_new_files({"--gif": asked.gif}, overwrite=asked.overwrite, inputs=[asked.input])
    from rich.console import Console

    from llm_trm.cli.solve_screen import Screen
    from llm_trm.evaluate.puzzle_gif import require_gif, write_gif
    from llm_trm.evaluate.questions import read_questions
    from llm_trm.evaluate.solving import load_solver, require_solvable
    from llm_trm.evaluate.solving import solve as solve_question

    text, source = (str(puzzle), "PUZZLE") if asked.input is None else read_input(asked.input, "puzzles")
    questions = read_questions(text, source)
    if asked.gif is not None:
        require_gif()
        if len(questions) > 1:
            raise click.UsageError(f"--gif shows one puzzle, and there are {len(questions)}: give one")
    where = resolve_device(asked.device)
    model, facts, folder = load_solver(asked.checkpoint, questions[0])
    for question in questions:
        require_solvable(model, facts, folder, question)
    model = model.to(where)
    tries = asked.attempts.tries
    steps = asked.max_steps or model.config.max_steps
    valid = 0
    console = Console(highlight=False, soft_wrap=True)
    for question in questions:
        screen = Screen(console, question, steps, tries, asked.delay)
        if note := question.note():
            console.print(f"Note: {note}.", markup=False)
        with screen:
            attempt = solve_question(
                model,
                question,
                max_steps=steps,
                tries=tries,
                noise=asked.attempts.deviation,
                seed=asked.seed,
                watch=screen.show,
            )
            screen.finish(attempt)
        fault = question.fault(attempt.last.tokens)
        valid += fault is None
        console.print(_verdict(attempt, fault, steps, tries), markup=False)
        if asked.gif is not None:
            write_gif(asked.gif, question, attempt, asked.delay)
            console.print(f"The animation is in {asked.gif}.", markup=False)
    if len(questions) > 1:
        console.print(f"{valid} of {len(questions)} answers are valid.")
    if valid < len(questions):
        context.exit(1)


def _verdict(attempt: Attempt, fault: str | None, max_steps: int, tries: int) -> str:
    last = attempt.last
    judgement = "Valid" if fault is None else f"Not valid: {fault}"
    which = f", try {attempt.number} of {tries}" if tries > 1 else ""
    return (
        f"{judgement}; step {last.number} of at most {max_steps}{which}, halting confidence "
        f"{last.confidence:.1%}."
    )
