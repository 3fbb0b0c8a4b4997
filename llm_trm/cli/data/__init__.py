"""``llm-trm data``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from llm_trm.cli.group import Group
from llm_trm.cli.options.output import output_file
from llm_trm.cli.options.types import COUNT, SEED
from llm_trm.cli.options.world import world_from, world_options

#: Of a problem of one operation with its trace, at least.
_BYTES_A_LINE = 70


@click.group(
    cls=Group,
    commands_at={
        "arc": "llm_trm.cli.data.arc:arc",
        "maze": "llm_trm.cli.data.maze:maze",
        "sudoku": "llm_trm.cli.data.sudoku:sudoku",
    },
)
def data() -> None:
    """Write problems and puzzles to learn from."""


@data.command(short_help="Write problems of the arithmetic world as JSONL.")
@click.option("--num-samples", type=COUNT, default=1000, show_default=True, help="How many problems.")
@world_options
@click.option(
    "--split",
    type=click.Choice(["train", "test"]),
    default="train",
    show_default=True,
    help="No question is in both.",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Same seed, same problems.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=output_file,
    help="JSONL file to write. [default: standard output]",
)
@click.pass_context
def arithmetic(
    context: click.Context,
    /,
    num_samples: int,
    split: str,
    seed: int,
    output: Path | None,
    **drawn: Any,
) -> None:
    """Write chains of additions, subtractions and multiplications, with worked traces.

    A problem is worked from left to right on a running total, modulo --modulus: 7+5*3-8 is 8. Each line is
    a JSON object with question, thinking (the worked trace), answer and operations.

    \b
    Examples:
      llm-trm data arithmetic --num-samples 3
      llm-trm data arithmetic --operations 3 --split test --num-samples 500 -o held_out.jsonl
    """
    from llm_trm.files import write_lines
    from llm_trm.memory import require_disk_space

    world = world_from(context, drawn)
    lines = (
        json.dumps(problem.record()) + "\n"
        for problem in world.problems(num_samples, split, seed)  # type: ignore[arg-type]
    )
    if output is None:
        sys.stdout.writelines(lines)
    else:
        size, what = _BYTES_A_LINE * num_samples, f"{num_samples:,} problems"
        require_disk_space(size, output.parent, what, "choose fewer --num-samples")
        write_lines(output, lines)
