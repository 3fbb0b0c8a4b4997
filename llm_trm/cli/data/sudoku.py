"""``llm-trm data sudoku``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from llm_trm.cli.bars import progress_bar
from llm_trm.cli.options.types import CLUES, COUNT, FOLDER, RATING, SEED, SHARE_WITHIN

if TYPE_CHECKING:
    from llm_trm.data.puzzles.sudoku_rows import SudokuRows

#: From few clues, near what a grid of the size needs at least, to about half of its cells.
_CLUES = {4: (4, 8), 6: (9, 18), 9: (24, 36)}
_OF_GENERATION = ("size", "num_samples", "clues")
_OF_READING = ("subsample", "min_rating", "test_fraction", "trust")


@click.command(short_help="Write Sudokus: made from nothing, from a file, or from the hub.")
@click.option(
    "--size",
    type=click.Choice(["4", "6", "9"]),
    default="9",
    show_default=True,
    help="Digits of generated puzzles. Boxes are 2x2, 2x3 or 3x3.",
)
@click.option(
    "--num-samples",
    type=COUNT,
    default=1000,
    show_default=True,
    help="Training puzzles to generate.",
)
@click.option(
    "--test-samples",
    type=COUNT,
    help="Puzzles to hold out. [default: 200 generated ones; --test-fraction of a file; all of a test split]",
)
@click.option(
    "--clues",
    type=CLUES,
    nargs=2,
    metavar="LOW HIGH",
    help="Clues of generated puzzles, each number in the range as likely where it can be reached. "
    f"[default: {', '.join(f'{low} {high} for {size}x{size}' for size, (low, high) in _CLUES.items())}]",
)
@click.option(
    "--input",
    "file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Read a CSV or JSONL file instead, with the columns puzzle (or quizzes, question) and, where there "
    "is one, solution (or solutions, answer).",
)
@click.option(
    "--dataset",
    metavar="NAME",
    help="Read a data set of the hub instead, such as sapientinc/sudoku-extreme.",
)
@click.option("--subsample", type=COUNT, help="Train on so many of the puzzles read. [default: all]")
@click.option("--min-rating", type=RATING, help="Leave out puzzles that are rated as easier.")
@click.option(
    "--test-fraction",
    type=SHARE_WITHIN,
    help="Share of the puzzles to hold out, where there is no test split. [default: 0.1]",
)
@click.option(
    "--trust",
    is_flag=True,
    help="Do not search for second solutions of puzzles read (a millisecond each); given solutions are still "
    "checked.",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Same seed, same puzzles.")
@click.option(
    "-o",
    "--output",
    type=FOLDER,
    default=Path("data/sudoku"),
    show_default=True,
    help="Folder to write.",
)
@click.pass_context
def sudoku(
    context: click.Context,
    size: str,
    num_samples: int,
    test_samples: int | None,
    clues: tuple[int, int] | None,
    file: Path | None,
    dataset: str | None,
    subsample: int | None,
    min_rating: float | None,
    test_fraction: float | None,
    trust: bool,
    seed: int,
    output: Path,
) -> None:
    """Write Sudokus to train on and others to test with: each has exactly one solution.

    No symmetry turns a held-out 4x4 or 6x6 puzzle into a training puzzle, since training draws from all of
    these. 9x9 puzzles have too many symmetries for that check: there, none that is held out equals a training
    puzzle.

    \b
    Examples:
      llm-trm data sudoku --size 4 -o data/sudoku4
      llm-trm data sudoku --size 6 --num-samples 5000 --clues 10 16 -o data/sudoku6
      llm-trm data sudoku --input puzzles.csv --test-samples 500
      llm-trm data sudoku --dataset sapientinc/sudoku-extreme --subsample 1000 --test-samples 10000
    """
    if file is not None and dataset is not None:
        raise click.UsageError("--input and --dataset exclude each other: give one of them")
    reads = file is not None or dataset is not None
    for name in _OF_GENERATION if reads else _OF_READING:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            need = "without" if reads else "with"
            raise click.UsageError(
                f"--{name.replace('_', '-')} goes {need} --input or --dataset: leave it out"
            )
    if test_samples is not None and test_fraction is not None:
        raise click.UsageError("--test-samples and --test-fraction exclude each other: give one of them")
    from llm_trm.data.puzzles.dataset import write_puzzles
    from llm_trm.data.puzzles.sudoku import SHAPES, number_of_clues
    from llm_trm.data.puzzles.sudoku_splits import generated_splits, held_out_splits, sudoku_info
    from llm_trm.files import writable_folder

    writable_folder(output)
    facts: dict[str, Any] = {"seed": seed}
    if reads:
        rows = _read(file, dataset)
        if min_rating is not None:
            rows = {split: part.rated(min_rating) for split, part in rows.items()}
        shape = rows["train"].shape
        splits = held_out_splits(
            rows["train"],
            rows.get("test"),
            train=subsample,
            test=test_samples,
            fraction=0.1 if test_fraction is None else test_fraction,
            seed=seed,
            trust=trust,
            progress=_bar("verifying"),
        )
        facts |= {"source": str(file or dataset), "min_rating": min_rating, "trusted": trust}
    else:
        shape = SHAPES[int(size)]
        low, high = clues or _CLUES[shape.size]
        if not low <= high <= shape.cells:
            raise click.UsageError(f"--clues {low} {high}: give the fewest first, and at most {shape.cells}")
        splits = generated_splits(
            shape, num_samples, test_samples or 200, (low, high), seed, _bar("generating")
        )
        facts |= {"source": "generated", "clues": [low, high]}
    write_puzzles(output, sudoku_info(shape, facts), splits)
    train, test = splits["train"], splits["test"]
    given = number_of_clues(train.inputs.numpy() - 1)
    click.echo(
        f"{len(train)} {shape.size}x{shape.size} Sudokus to train on, {len(test)} held out, with "
        f"{given.min()} to {given.max()} clues ({given.mean():.1f} on average): {output}"
    )
    click.echo(f"Next: llm-trm train puzzle --task sudoku --data {output}")


def _read(file: Path | None, dataset: str | None) -> dict[str, SudokuRows]:
    from llm_trm.data.puzzles.sudoku_files import read_sudoku_dataset, read_sudoku_file
    from llm_trm.errors import InputError

    if file is not None:
        return {"train": read_sudoku_file(file)}
    rows = read_sudoku_dataset(str(dataset), _bar("reading"))
    if "train" not in rows:
        raise InputError(f"the data set {dataset} has no split train: name another")
    return rows


def _bar(text: str) -> Callable[[Iterable[Any], int], Iterator[Any]]:
    """A wrapper of iterators that shows a progress bar on a terminal."""

    def tracked(items: Iterable[Any], total: int) -> Iterator[Any]:
        with progress_bar(text, total) as advance:
            for item in items:
                yield item
                advance(1)

    return tracked
