"""The progress and the result table of ``llm-trm train phase1``."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import TaskID
from rich.table import Table

from llm_trm.cli.bars import training_bar
from llm_trm.train.phase1.report import Progress, StageResult


class ConsoleProgress(Progress):
    """One bar per task on stderr if that is a terminal, otherwise one line per finished task."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bars = training_bar(self._console)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> ConsoleProgress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def say(self, line: str) -> None:
        self._console.print(line)

    def states(self, what: str, done: int, total: int) -> None:
        self._show(what, done, total, "")

    def training(self, what: str, done: int, total: int, loss: float, cosine: float) -> None:
        self._show(what, done, total, f"loss {loss:.5f}  held-out cos {cosine:.4f}")

    def _show(self, what: str, done: int, total: int, numbers: str) -> None:
        if self._bars.disable:
            if done == total and what not in self._tasks:
                self._tasks[what] = TaskID(len(self._tasks))
                self.say(f"{what}: {total:,} {numbers}".rstrip())
            return
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total, numbers=numbers)
        self._bars.update(self._tasks[what], completed=done, numbers=numbers)


def result_table(results: Sequence[StageResult], latent: bool) -> Table:
    """The results, one row per compressor, all measured on held-out states."""
    table = Table(box=None, pad_edge=False)
    other = "mean state" if latent else "PCA"
    columns = ["stage", "M" if latent else "D'", "ratio", "cosine", f"cosine, {other}", "relative error"]
    for column in (*columns, f"rel. error, {other}", "MSE", f"MSE, {other}"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for result in results:
        learned, reference = result.learned, result.reference
        table.add_row(
            result.stage,
            str(result.size),
            f"{result.ratio:.1f}",
            f"{learned.cosine_similarity:.4f}",
            f"{reference.cosine_similarity:.4f}",
            f"{learned.relative_error:.4f}",
            f"{reference.relative_error:.4f}",
            f"{learned.mse:.3e}",
            f"{reference.mse:.3e}",
        )
    return table
