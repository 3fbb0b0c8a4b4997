"""``llm-trm solve``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from llm_trm.cli.options.device import device_option
from llm_trm.cli.options.output import output_file
from llm_trm.cli.options.tries import noise_of, tries_options
from llm_trm.cli.options.types import DELAY, DEPTH, FOLDER, SEED
from llm_trm.device import resolve_device

if TYPE_CHECKING:
    from llm_trm.evaluate.solving import Attempt


@click.command(short_help="Solve a Sudoku or a maze before your eyes.")
@click.argument("puzzle", required=False)
@click.option(
    "--file",
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    help="Text file of puzzles; - is standard input.",
)
@click.option(
    "--checkpoint",
    type=FOLDER,
    help="Folder of a run, whose best checkpoint is taken, a single checkpoint, or an imported model. "
    "[default: runs/sudoku or runs/maze]",
)
@click.option(
    "--inference-steps",
    type=DEPTH,
    help="Supervision steps at most; may be more than in training. [default: as many as in training]",
)
@tries_options
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the noise.")
@click.option(
    "--gif",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=output_file,
    metavar="FILE",
    help="Write an animation of the steps too; of one puzzle.",
)
@click.option(
    "--delay",
    type=DELAY,
    default=0.4,
    show_default=True,
    help="Seconds that a step stays on a terminal and in the animation.",
)
@device_option
@click.pass_context
def solve(
    context: click.Context,
    puzzle: str | None,
    file: Path | None,
    checkpoint: Path | None,
    inference_steps: int | None,
    tries: int,
    noise: float | None,
    seed: int,
    gif: Path | None,
    delay: float,
    device: str,
) -> None:
    """Solve PUZZLE with a trained model, step by step.

    PUZZLE is a Sudoku of 16, 36 or 81 cells, row by row: digits, and 0 . _ - * for blanks; spaces and line
    ends count for nothing. Or it is a maze, a row on each line: # walls, spaces, S the start, G the goal. A
    file holds Sudokus, each on one line or on a line for each row, or mazes with empty lines between them.

    The model stops when its halting head holds the answer for right. Whether the answer is valid is checked
    by the rules and the clues. The exit code is 0 if every answer is valid, and 1 if the model was wrong.

    \b
    Examples:
      llm-trm solve "1... ..3. .4.. ...2"
      llm-trm solve --file puzzles.txt --tries 8
      llm-trm solve "1... ..3. .4.. ...2" --gif solved.gif
      llm-trm solve --file maze.txt
    """
    if (puzzle is None) == (file is None):
        raise click.UsageError("give a PUZZLE, or a file of puzzles with --file")
    noise_used = noise_of(tries, noise)
    from rich.console import Console

    from llm_trm.cli.solve_screen import Screen
    from llm_trm.evaluate.puzzle_gif import require_gif, write_gif
    from llm_trm.evaluate.questions import read_questions
    from llm_trm.evaluate.solving import load_solver, require_solvable
    from llm_trm.evaluate.solving import solve as solve_question

    text, source = (str(puzzle), "PUZZLE") if file is None else _read(file)
    questions = read_questions(text, source)
    if gif is not None:
        require_gif()
        if len(questions) > 1:
            raise click.UsageError(f"--gif shows one puzzle, and there are {len(questions)}: give one")
    where = resolve_device(device)
    model, facts, folder = load_solver(checkpoint, questions[0])
    for question in questions:
        require_solvable(model, facts, folder, question)
    model = model.to(where)
    steps = inference_steps or model.config.max_steps
    valid = 0
    console = Console(highlight=False, soft_wrap=True)
    for question in questions:
        screen = Screen(console, question, steps, tries, delay)
        if note := question.note():
            console.print(f"Note: {note}.", markup=False)
        with screen:
            attempt = solve_question(
                model,
                question,
                max_steps=steps,
                tries=tries,
                noise=noise_used,
                seed=seed,
                watch=screen.show,
            )
            screen.finish(attempt)
        fault = question.fault(attempt.last.tokens)
        valid += fault is None
        console.print(_verdict(attempt, fault, steps, tries), markup=False)
        if gif is not None:
            write_gif(gif, question, attempt, delay)
            console.print(f"The animation is in {gif}.", markup=False)
    if len(questions) > 1:
        console.print(f"{valid} of {len(questions)} answers are valid.")
    if valid < len(questions):
        context.exit(1)


def _read(file: Path) -> tuple[str, str]:
    """The text of a file, and what to call it."""
    from llm_trm.errors import InputError, one_line
    from llm_trm.text import read_stdin, read_text

    name = "standard input" if str(file) == "-" else str(file)
    try:
        text = read_stdin() if str(file) == "-" else read_text(file)
    except FileNotFoundError:
        raise InputError(
            f"{name} does not exist: name a text file of puzzles, or - for standard input"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{name} cannot be read ({one_line(error)}): name a text file of puzzles") from error
    return text, name


def _verdict(attempt: Attempt, fault: str | None, max_steps: int, tries: int) -> str:
    last = attempt.last
    judgement = "Valid" if fault is None else f"Not valid: {fault}"
    which = f", try {attempt.number} of {tries}" if tries > 1 else ""
    return (
        f"{judgement}; step {last.number} of at most {max_steps}{which}, halting confidence "
        f"{last.confidence:.1%}."
    )
