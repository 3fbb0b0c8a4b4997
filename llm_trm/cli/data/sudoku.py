"""``llm-trm data sudoku``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from llm_trm.cli.bars import progress_bar
from llm_trm.cli.options.combinations import reject_given
from llm_trm.cli.options.settings import settings_options
from llm_trm.cli.options.types import number
from llm_trm.errors import InputError
from llm_trm.ranges import CLUES, COUNT, RATING, SEED, SHARE_WITHIN
from llm_trm.settings import Settings, setting
from llm_trm.shared_settings import overwrite_puzzles

if TYPE_CHECKING:
    from llm_trm.data.puzzles.sudoku_rows import SudokuRows

#: From close to the minimum for a grid of the size to about half of its cells.
_CLUES = {4: (4, 8), 6: (9, 18), 9: (24, 36)}
_GENERATING = ("size", "num_samples", "clues")
_READING = ("subsample", "min_rating", "test_fraction", "trust")


@dataclass(frozen=True)
class SudokuSettings(Settings):
    """Options of ``llm-trm data sudoku`` other than ``--clues``."""

    size: Literal["4", "6", "9"] = setting(
        "9", "Number of digits in generated puzzles. Boxes are 2x2, 2x3 or 3x3."
    )
    num_samples: int = setting(1000, "Number of training puzzles to generate.", COUNT)
    test_samples: int | None = setting(
        None,
        "Number of puzzles to hold out.",
        COUNT,
        unset="200 generated ones; --test-fraction of a file; a whole test split",
    )
    input: Path | None = setting(
        None,
        "Read a CSV or JSONL file with the columns puzzle (or quizzes, question) and, optionally, solution "
        "(or solutions, answer); or a .sdk, .sdm or .ss file of grids.",
        file="read",
    )
    dataset: str | None = setting(
        None, "Read a data set on the hub, such as sapientinc/sudoku-extreme.", metavar="NAME"
    )
    subsample: int | None = setting(
        None, "Number of puzzles to train on, of those that are read.", COUNT, unset="all"
    )
    min_rating: float | None = setting(None, "Leave out puzzles with a lower difficulty rating.", RATING)
    test_fraction: float | None = setting(
        None, "Fraction of the puzzles to hold out, if there is no test split.", SHARE_WITHIN, unset="0.1"
    )
    trust: bool = setting(
        False,
        "Do not search for second solutions of the puzzles that are read (a millisecond each); solutions in "
        "the file are still checked.",
    )
    seed: int = setting(0, "Seed for the puzzles.", SEED)
    output: Path = setting(Path("data/sudoku"), "Folder to write.", None, "-o", "--output")
    overwrite: bool = overwrite_puzzles()


@click.command(short_help="Write Sudokus: generated, from a file, or from the hub.")
@click.option(
    "--clues",
    type=number(CLUES),
    nargs=2,
    metavar="LOW HIGH",
    help="Range of the number of clues in generated puzzles, drawn uniformly as far as possible. "
    f"[default: {', '.join(f'{low} {high} for {size}x{size}' for size, (low, high) in _CLUES.items())}]",
)
@settings_options(SudokuSettings, config_file=False)
@click.pass_context
def sudoku(context: click.Context, /, clues: tuple[int, int] | None, given: dict[str, Any]) -> None:
    """Write Sudokus to train on and to test with; each has exactly one solution.

    No symmetry maps a held-out 4x4 or 6x6 puzzle to a training puzzle, since training applies all of them.
    9x9 puzzles have too many symmetries for that check: there, no held-out puzzle equals a training puzzle.

    \b
    Examples:
      llm-trm data sudoku --size 4 -o data/sudoku4
      llm-trm data sudoku --size 6 --num-samples 5000 --clues 10 16 -o data/sudoku6
      llm-trm data sudoku --input puzzles.csv --test-samples 500
      llm-trm data sudoku --dataset sapientinc/sudoku-extreme --subsample 1000 --test-samples 10000
    """
    asked = SudokuSettings(**given)
    if asked.input is not None and asked.dataset is not None:
        raise click.UsageError("--input and --dataset cannot be used together: leave one of them out")
    reads = asked.input is not None or asked.dataset is not None
    need = "without" if reads else "only with"
    unfit = _GENERATING if reads else _READING
    reject_given(context, unfit, f"can be used {need} --input or --dataset: leave it out")
    if asked.test_samples is not None and asked.test_fraction is not None:
        raise click.UsageError(
            "--test-samples and --test-fraction cannot be used together: leave one of them out"
        )
    from llm_trm.data.puzzles.dataset import new_puzzles

    with new_puzzles(asked.output, overwrite=asked.overwrite):
        _write(asked, clues, reads=reads)
    click.echo(f"Next: llm-trm train puzzle --task sudoku --data {asked.output}")


def _write(asked: SudokuSettings, clues: tuple[int, int] | None, *, reads: bool) -> None:
    from llm_trm.data.puzzles.dataset import write_puzzles
    from llm_trm.data.puzzles.sudoku import SHAPES, number_of_clues
    from llm_trm.data.puzzles.sudoku_splits import generated_splits, held_out_splits, sudoku_info

    facts: dict[str, Any] = {"seed": asked.seed}
    if reads:
        rows = _read(asked.input, asked.dataset)
        if asked.min_rating is not None:
            rows = {split: part.rated(asked.min_rating) for split, part in rows.items()}
        shape = rows["train"].shape
        splits = held_out_splits(
            rows["train"],
            rows.get("test"),
            train=asked.subsample,
            test=asked.test_samples,
            fraction=0.1 if asked.test_fraction is None else asked.test_fraction,
            seed=asked.seed,
            trust=asked.trust,
            progress=_bar("verifying"),
        )
        source = str(asked.input or asked.dataset)
        facts |= {"source": source, "min_rating": asked.min_rating, "trusted": asked.trust}
    else:
        shape = SHAPES[int(asked.size)]
        low, high = clues or _CLUES[shape.size]
        if not low <= high <= shape.cells:
            raise click.UsageError(f"--clues {low} {high}: give the fewest first, and at most {shape.cells}")
        test = asked.test_samples or 200
        splits = generated_splits(shape, asked.num_samples, test, (low, high), asked.seed, _bar("generating"))
        facts |= {"source": "generated", "clues": [low, high]}
    write_puzzles(asked.output, sudoku_info(shape, facts), splits)
    train = splits["train"]
    counts = number_of_clues(train.inputs.numpy() - 1)
    click.echo(
        f"{len(train)} {shape.size}x{shape.size} Sudokus to train on, {len(splits['test'])} held out, with "
        f"{counts.min()} to {counts.max()} clues ({counts.mean():.1f} on average): {asked.output}"
    )


def _read(file: Path | None, dataset: str | None) -> dict[str, SudokuRows]:
    from llm_trm.data.puzzles.sudoku_files import read_sudoku_dataset, read_sudoku_file

    if file is not None:
        return {"train": read_sudoku_file(file)}
    rows = read_sudoku_dataset(str(dataset), _bar("reading"))
    if "train" not in rows:
        raise InputError(f"the data set {dataset} has no split train: name another")
    return rows


def _bar(text: str) -> Callable[[Iterable[Any], int], Iterator[Any]]:
    """A function that wraps an iterable in a progress bar."""

    def tracked(items: Iterable[Any], total: int) -> Iterator[Any]:
        with progress_bar(text, total) as advance:
            for item in items:
                yield item
                advance(1)

    return tracked
