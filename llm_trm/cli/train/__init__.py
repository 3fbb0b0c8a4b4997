"""``llm-trm train``."""

from __future__ import annotations

import click

from llm_trm.cli.group import Group


@click.group(
    short_help="Train a language model, a compressor, a recursion or a puzzle solver.",
    cls=Group,
    commands_at={
        "lm": "llm_trm.cli.train.lm:lm",
        "lora": "llm_trm.cli.train.lora:lora",
        "phase1": "llm_trm.cli.train.phase1:phase1",
        "phase2": "llm_trm.cli.train.phase2:phase2",
        "phase3": "llm_trm.cli.train.phase3:phase3",
        "puzzle": "llm_trm.cli.train.puzzle:puzzle",
    },
)
def train() -> None:
    """Train a puzzle solver, or a recursion that replaces a language model's thinking.

    \b
    Puzzles:
      llm-trm train puzzle   a recursion on Sudoku, mazes or ARC
    \b
    A recursion that replaces thinking, in this order:
      llm-trm train lm       a tiny language model that thinks (one is bundled)
      llm-trm train phase1   a compressor of its hidden states
      llm-trm datagen        its states before and after thinking
      llm-trm train phase2   a recursion that predicts the state after thinking
      llm-trm train lora     the language model and the recursion together, on questions and answers
      llm-trm train phase3   only the recursion, by reinforcement learning
    """
