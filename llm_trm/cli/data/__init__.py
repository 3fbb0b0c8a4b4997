"""``llm-trm data``."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from llm_trm.cli.group import Group
from llm_trm.cli.options.new_files import require_new_files
from llm_trm.cli.options.settings import settings_options
from llm_trm.cli.options.world import SAME_DIFFICULTY, set_difficulty
from llm_trm.data.arithmetic import Split, World
from llm_trm.ranges import COUNT, SEED
from llm_trm.settings import Settings, setting
from llm_trm.shared_settings import overwrite

#: Minimum size of a problem of one operation, with its trace.
_BYTES_PER_LINE = 70


@click.group(
    cls=Group,
    commands_at={
        "arc": "llm_trm.cli.data.arc:arc",
        "maze": "llm_trm.cli.data.maze:maze",
        "sudoku": "llm_trm.cli.data.sudoku:sudoku",
    },
)
def data() -> None:
    """Write problems and puzzles to train on."""


@dataclass(frozen=True)
class ArithmeticSettings(Settings):
    """Options of ``llm-trm data arithmetic``."""

    num_samples: int = setting(1000, "Number of problems.", COUNT)
    world: World = field(default_factory=World)
    split: Split = setting("train", "Split of the problems; no question is in both.")
    seed: int = setting(0, "Seed for the problems.", SEED)
    output: Path | None = setting(
        None, "JSONL file to write.", None, "-o", "--output", unset="standard output", file="write"
    )
    overwrite: bool = overwrite()


@data.command(short_help="Write problems of the arithmetic world as JSONL.")
@settings_options(ArithmeticSettings, SAME_DIFFICULTY, config_file=False)
@click.pass_context
def arithmetic(context: click.Context, /, given: dict[str, Any]) -> None:
    """Write chains of additions, subtractions and multiplications, with worked traces.

    A problem is evaluated from left to right on a running total, modulo --modulus: 7+5*3-8 is 8. Each line is
    a JSON object with question, thinking (the worked trace), answer and operations.

    \b
    Examples:
      llm-trm data arithmetic --num-samples 3
      llm-trm data arithmetic --operations 3 --split test --num-samples 500 -o held_out.jsonl
    """
    from llm_trm.files import write_lines
    from llm_trm.memory import require_disk_space

    set_difficulty(context, given)
    asked = ArithmeticSettings(**given)
    require_new_files({"--output": asked.output}, overwrite=asked.overwrite)
    lines = (
        json.dumps(problem.record()) + "\n"
        for problem in asked.world.problems(asked.num_samples, asked.split, asked.seed)
    )
    if asked.output is None:
        sys.stdout.writelines(lines)
    else:
        size, what = _BYTES_PER_LINE * asked.num_samples, f"{asked.num_samples:,} problems"
        require_disk_space(size, asked.output.parent, what, "choose fewer --num-samples")
        write_lines(asked.output, lines)
