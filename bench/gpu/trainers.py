"""Times the trainers against reimplementations of the original ones."""

from __future__ import annotations

from typing import Any

import torch

from bench import puzzle, training
from bench.gpu.context import Context
from bench.pretend import pretending

#: The first steps compile and capture.
_PATIENCE = 40.0


def run_puzzle(context: Context) -> None:
    """Time the puzzle trainer's step, without the compiled baseline, which takes too long here."""
    _run(context, puzzle, compiled=False)


def run_trainer(context: Context) -> None:
    """Time phase 2's trainer."""
    _run(context, training)


def _run(context: Context, module: Any, **options: Any) -> None:
    line = module.run_case(
        module.CASES["cuda"][context.argument["case"]],
        torch.device("cuda"),
        min(context.argument["seconds"], context.left / 2),
        lambda what: context.doing(what, _PATIENCE),
        compare=not pretending(),  # made-up values never agree
        **options,
    )
    print(module.describe(line), flush=True)
    context.line(line)
