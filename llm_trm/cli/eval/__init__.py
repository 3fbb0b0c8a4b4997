"""``llm-trm eval``."""

from __future__ import annotations

import click

from llm_trm.cli.group import Group


@click.group(
    "eval",
    cls=Group,
    commands_at={
        "lm": "llm_trm.cli.eval.lm:lm",
        "phase2": "llm_trm.cli.eval.phase2:phase2",
        "puzzle": "llm_trm.cli.eval.puzzle:puzzle",
    },
)
def evaluate() -> None:
    """Evaluate a trained model on held-out data."""
