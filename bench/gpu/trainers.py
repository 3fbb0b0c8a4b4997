"""Trainers beside the original ones, restated: whole runs as their users start them."""

from __future__ import annotations

import torch

from bench import puzzle, training
from bench.gpu.child import Context
from bench.pretend import pretending

#: The first steps compile and capture.
_PATIENCE = 40.0


def run_puzzle(context: Context) -> None:
    """The puzzle trainer's step; the compiled form takes too long here."""
    case = puzzle.CASES["cuda"][context.argument["case"]]
    seconds = min(context.argument["seconds"], context.left / 2)
    line = puzzle.run_case(
        case,
        torch.device("cuda"),
        seconds,
        lambda what: context.doing(what, _PATIENCE),
        compiled=False,
        compare=not pretending(),  # made-up numbers agree with nothing
    )
    print(puzzle.describe(line), flush=True)
    context.line(line)


def run_trainer(context: Context) -> None:
    """Phase 2's trainer."""
    case = training.CASES["cuda"][context.argument["case"]]
    seconds = min(context.argument["seconds"], context.left / 2)
    line = training.run_case(
        case,
        torch.device("cuda"),
        seconds,
        lambda what: context.doing(what, _PATIENCE),
        compare=not pretending(),
    )
    print(training.describe(line), flush=True)
    context.line(line)
