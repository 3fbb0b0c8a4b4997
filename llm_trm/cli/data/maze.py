"""``llm-trm data maze``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from llm_trm.cli.options.types import COUNT, FOLDER, MAZE_SIDE, NO_OR_COUNT, PATH_STEPS, SEED

if TYPE_CHECKING:
    from llm_trm.data.puzzles.maze_files import Mazes

_TRAIN, _TEST = 1000, 200


@click.command(short_help="Write mazes and their shortest paths.")
@click.option(
    "--size",
    type=MAZE_SIDE,
    default=30,
    show_default=True,
    help="Rows, and columns, of a generated maze.",
)
@click.option(
    "--min-path",
    type=PATH_STEPS,
    help="Fewest steps from start to goal of a generated maze, by its shortest path. [default: 111 at size "
    "30, as many a cell elsewhere]",
)
@click.option(
    "--num-samples",
    type=COUNT,
    help=f"Mazes to train on. [default: {_TRAIN} generated ones; all that are read]",
)
@click.option(
    "--test-samples",
    type=NO_OR_COUNT,
    help=f"Mazes held out. [default: {_TEST}; all of the test split of --dataset]",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Same seed, same mazes.")
@click.option(
    "--input",
    "source",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Read mazes from this .csv or .jsonl file with the columns question and answer.",
)
@click.option(
    "--dataset",
    help="Read the train and the test split of a data set on the hub, such as sapientinc/maze-30x30-hard-1k.",
)
@click.option(
    "-o",
    "--output",
    type=FOLDER,
    default=Path("data/maze"),
    show_default=True,
    help="Folder to write.",
)
@click.pass_context
def maze(
    context: click.Context,
    size: int,
    min_path: int | None,
    num_samples: int | None,
    test_samples: int | None,
    seed: int,
    source: Path | None,
    dataset: str | None,
    output: Path,
) -> None:
    """Write mazes with one start, one goal, and the shortest path between them as the answer.

    Mazes are generated, unless --input or --dataset says where to read them. A generated one has a single
    shortest path, and none of them, trained on or held out, is another one turned or mirrored. Of a file,
    mazes drawn by --seed are held out; of a data set its test split, and what equals it is not trained on.

    \b
    Examples:
      llm-trm data maze
      llm-trm data maze --size 10 --num-samples 5000 -o data/maze10
      llm-trm data maze --dataset sapientinc/maze-30x30-hard-1k -o data/maze-hard
    """
    if source is not None and dataset is not None:
        raise click.UsageError("--input and --dataset exclude one another: leave one out")
    reads = "--input" if source is not None else "--dataset"
    if source is not None or dataset is not None:
        for name in ("size", "min_path"):
            if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                option = f"--{name.replace('_', '-')}"
                raise click.UsageError(
                    f"{option} is of generated mazes, and {reads} reads them: leave it out"
                )
    from llm_trm.data.puzzles.maze import default_min_path
    from llm_trm.data.puzzles.maze_folder import write_mazes
    from llm_trm.files import writable_folder

    facts: dict[str, Any] = {"seed": seed}
    writable_folder(output)
    if source is not None:
        held_out = _TEST if test_samples is None else test_samples
        splits = _of_file(source, num_samples, held_out, seed)
        facts["source"] = str(source)
    elif dataset is not None:
        splits = _of_hub(dataset, num_samples, test_samples, seed)
        facts["source"] = dataset
    else:
        fewest = default_min_path(size, size) if min_path is None else min_path
        counts = {
            "test": _TEST if test_samples is None else test_samples,
            "train": _TRAIN if num_samples is None else num_samples,
        }
        splits = _generated(size, fewest, counts, seed)
        facts |= {"source": "generated", "min_path": fewest}
    info = write_mazes(output, splits, facts)
    steps = info.facts["steps"]["train"]
    click.echo(
        f"{output}: {len(splits['train'])} mazes of {info.rows} x {info.columns} cells to train on, "
        f"{len(splits['test'])} held out; shortest paths of {steps['min']} to {steps['max']} steps, "
        f"{steps['mean']} on average"
    )


def _generated(size: int, min_path: int, counts: dict[str, int], seed: int) -> dict[str, Mazes]:
    from llm_trm.cli.bars import progress_bar
    from llm_trm.data.puzzles.maze_generation import generate_mazes

    with progress_bar("mazes", sum(counts.values())) as progress:
        return generate_mazes(size, size, counts, min_path=min_path, seed=seed, progress=progress)


def _of_file(path: Path, num_samples: int | None, test_samples: int, seed: int) -> dict[str, Mazes]:
    from llm_trm.data.puzzles.maze_files import read_mazes
    from llm_trm.data.puzzles.maze_generation import distinct

    mazes = _drawn(distinct(read_mazes(path)), None, seed)
    if test_samples >= len(mazes):
        raise click.UsageError(
            f"{path} holds {len(mazes)} different mazes, and {test_samples} are to be held out: lower "
            "--test-samples"
        )
    rest = mazes[test_samples:]
    return {"train": rest[:num_samples], "test": mazes[:test_samples]}


def _of_hub(dataset: str, num_samples: int | None, test_samples: int | None, seed: int) -> dict[str, Mazes]:
    from llm_trm.data.puzzles.maze_files import load_mazes
    from llm_trm.data.puzzles.maze_generation import symmetry_class
    from llm_trm.errors import InputError

    test = _drawn(load_mazes(dataset, "test"), test_samples, seed)
    held_out = {symmetry_class(maze) for maze, _ in test}
    mazes = load_mazes(dataset, "train")
    train = [(maze, answer) for maze, answer in mazes if symmetry_class(maze) not in held_out]
    if not train:
        raise InputError(f"every training maze of {dataset} is held out: lower --test-samples")
    if len(train) < len(mazes):
        click.echo(f"not trained on, since they are held out: {len(mazes) - len(train)} mazes", err=True)
    return {"train": _drawn(train, num_samples, seed), "test": test}


def _drawn(mazes: Mazes, count: int | None, seed: int) -> Mazes:
    from random import Random

    return Random(seed).sample(mazes, len(mazes))[:count]
