"""How ``llm-trm solve`` shows an answer."""

from __future__ import annotations

import time

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text
from torch import Tensor

from llm_trm.cli.puzzle_grids import draw
from llm_trm.evaluate.questions import Question
from llm_trm.evaluate.solving import Attempt, Step


class Screen:
    """Fills in the grid step by step on a terminal; elsewhere prints only the final grid.

    Args:
        console: Where to print.
        question: The puzzle.
        max_steps, tries: Maximum number of steps and of tries.
        delay: Seconds per step.
    """

    def __init__(
        self, console: Console, question: Question, max_steps: int, tries: int, delay: float
    ) -> None:
        self._console, self._question, self._delay = console, question, delay
        self._max_steps, self._tries = max_steps, tries
        self._plain = not (console.is_terminal and console.encoding.lower().startswith("utf"))
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._before: Tensor = question.tokens

    def __enter__(self) -> Screen:
        if self._live is not None:
            self._live.start()
            self._update(draw(self._question, self._question.tokens, plain=self._plain), "the puzzle")
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, number: int, step: Step) -> None:
        """Show the answer after a step of a try."""
        if self._live is None:
            return
        if step.number == 1:
            self._before = self._question.tokens
        which = f"try {number} of {self._tries}, " if self._tries > 1 else ""
        self._update(
            draw(self._question, step.tokens, self._before, plain=self._plain),
            f"{which}step {step.number} of at most {self._max_steps}, halting confidence "
            f"{step.confidence:.1%}",
        )
        self._before = step.tokens

    def finish(self, attempt: Attempt) -> None:
        """Show the final answer; only cells that contradict a clue are highlighted."""
        grid = draw(self._question, attempt.last.tokens, plain=self._plain)
        if self._live is None:
            self._console.print(grid)
        else:
            self._live.update(grid, refresh=True)

    def _update(self, grid: Text, caption: str) -> None:
        assert self._live is not None
        self._live.update(Group(grid, Text(caption, "dim")), refresh=True)
        time.sleep(self._delay)
