"""``python -m tests.fuzz``: long runs, and single cases again."""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import click
import torch

import tests.conftest  # noqa: F401 - sets up Triton's interpreter
from tests.fuzz.cases import Part, run
from tests.fuzz.parts import CASES, made
from tests.fuzz.weights import Weights


@click.command()
@click.argument("names", metavar="[options|readers|weights]...", nargs=-1, type=click.Choice(list(CASES)))
@click.option("--minutes", default=30.0, show_default=True, help="Time for all parts together.")
@click.option("--seed", default=0, show_default=True, help="Seed of the cases.")
@click.option("--case", "number", type=int, help="Run only the case of this number.")
@click.option("--keep", type=click.Path(path_type=Path, exists=True), help="Folder to leave the files in.")
def main(names: tuple[str, ...], minutes: float, seed: int, number: int | None, keep: Path | None) -> None:
    """Fuzz the options, the readers of files, and changes of weights; exit with 1 if a case fails."""
    torch.set_num_threads(1)  # more would only compete, for networks of this size
    chosen = names or tuple(CASES)
    failed = 0
    with ExitStack() as stack:
        parts: dict[str, Part] = {"weights": Weights()}
        if any(name not in parts for name in chosen):
            folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            parts |= stack.enter_context(made(folder, seed))
        for name in chosen:
            numbers = count() if number is None else iter([number])
            tally = run(name, parts[name], seed, numbers, 60 * minutes / len(chosen), click.echo)
            click.echo(tally)
            failed += len(tally.failed)
    sys.exit(1 if failed else 0)


main()
