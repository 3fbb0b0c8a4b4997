"""``llm-trm data maze``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llm_trm.cli.bars import progress_bar
from llm_trm.cli.options.combinations import reject_given
from llm_trm.cli.options.settings import settings_options
from llm_trm.errors import InputError
from llm_trm.ranges import COUNT, MAZE_SIDE, NO_OR_COUNT, PATH_STEPS, SEED
from llm_trm.settings import Settings, setting
from llm_trm.shared_settings import overwrite_puzzles

if TYPE_CHECKING:
    from llm_trm.data.puzzles.maze_files import Mazes

_TRAIN, _TEST = 1000, 200


@dataclass(frozen=True)
class MazeSettings(Settings):
    """Options of ``llm-trm data maze``."""

    size: int = setting(30, "Rows and columns of a generated maze.", MAZE_SIDE)
    min_path: int | None = setting(
        None,
        "Minimum number of steps on the shortest path of a generated maze.",
        PATH_STEPS,
        unset="111 at size 30, and the same per cell at other sizes",
    )
    num_samples: int | None = setting(
        None, "Number of mazes to train on.", COUNT, unset=f"{_TRAIN} generated ones; all that are read"
    )
    test_samples: int | None = setting(
        None,
        "Number of mazes to hold out.",
        NO_OR_COUNT,
        unset=f"{_TEST}; the whole test split of --dataset",
    )
    seed: int = setting(0, "Seed for the mazes.", SEED)
    input: Path | None = setting(
        None, "Read mazes from a .csv or .jsonl file with the columns question and answer.", file="read"
    )
    dataset: str | None = setting(
        None,
        "Read the train and the test split of a data set on the hub, such as sapientinc/maze-30x30-hard-1k.",
        metavar="NAME",
    )
    output: Path = setting(Path("data/maze"), "Folder to write.", None, "-o", "--output")
    overwrite: bool = overwrite_puzzles()


@click.command(short_help="Write mazes and their shortest paths.")
@settings_options(MazeSettings, config_file=False)
@click.pass_context
def maze(context: click.Context, /, given: dict[str, Any]) -> None:
    """Write mazes with one start, one goal, and the shortest path between them as the answer.

    Mazes are generated, unless --input or --dataset names mazes to read. A generated maze has a single
    shortest path, and no two mazes are rotations or reflections of each other. With --input, the held-out
    mazes are drawn at random (--seed). With --dataset, they are the test split, and training mazes that equal
    one of them are left out.

    \b
    Examples:
      llm-trm data maze
      llm-trm data maze --size 10 --num-samples 5000 -o data/maze10
      llm-trm data maze --dataset sapientinc/maze-30x30-hard-1k -o data/maze-hard
    """
    asked = MazeSettings(**given)
    if asked.input is not None and asked.dataset is not None:
        raise click.UsageError("--input and --dataset cannot be used together: leave one of them out")
    if asked.input is not None or asked.dataset is not None:
        reads = "--input" if asked.input is not None else "--dataset"
        reason = f"applies only to generated mazes, not to those of {reads}: leave it out"
        reject_given(context, ("size", "min_path"), reason)
    from llm_trm.data.puzzles.dataset import new_puzzles

    with new_puzzles(asked.output, overwrite=asked.overwrite):
        _write(asked)


def _write(asked: MazeSettings) -> None:
    from llm_trm.data.puzzles.maze import default_min_path
    from llm_trm.data.puzzles.maze_folder import write_mazes

    facts: dict[str, Any] = {"seed": asked.seed}
    held_out = _TEST if asked.test_samples is None else asked.test_samples
    if asked.input is not None:
        splits = _from_file(asked.input, asked.num_samples, held_out, asked.seed)
        facts["source"] = str(asked.input)
    elif asked.dataset is not None:
        splits = _from_hub(asked.dataset, asked.num_samples, asked.test_samples, asked.seed)
        facts["source"] = asked.dataset
    else:
        fewest = default_min_path(asked.size, asked.size) if asked.min_path is None else asked.min_path
        counts = {"test": held_out, "train": _TRAIN if asked.num_samples is None else asked.num_samples}
        splits = _generated(asked.size, fewest, counts, asked.seed)
        facts |= {"source": "generated", "min_path": fewest}
    info = write_mazes(asked.output, splits, facts)
    steps = info.facts["steps"]["train"]
    click.echo(
        f"{asked.output}: {len(splits['train'])} mazes of {info.rows} x {info.columns} cells to train on, "
        f"{len(splits['test'])} held out; shortest paths of {steps['min']} to {steps['max']} steps, "
        f"{steps['mean']} on average"
    )


def _generated(size: int, min_path: int, counts: dict[str, int], seed: int) -> dict[str, Mazes]:
    from llm_trm.data.puzzles.maze_generation import generate_mazes

    with progress_bar("mazes", sum(counts.values())) as progress:
        return generate_mazes(size, size, counts, min_path=min_path, seed=seed, progress=progress)


def _from_file(path: Path, num_samples: int | None, test_samples: int, seed: int) -> dict[str, Mazes]:
    from llm_trm.data.puzzles.maze_files import read_mazes
    from llm_trm.data.puzzles.maze_generation import distinct

    mazes = _drawn(distinct(read_mazes(path)), None, seed)
    if test_samples >= len(mazes):
        raise click.UsageError(
            f"{path} has {len(mazes)} different mazes, and {test_samples} are to be held out: lower "
            "--test-samples"
        )
    rest = mazes[test_samples:]
    return {"train": rest[:num_samples], "test": mazes[:test_samples]}


def _from_hub(dataset: str, num_samples: int | None, test_samples: int | None, seed: int) -> dict[str, Mazes]:
    from llm_trm.data.puzzles.maze_files import load_mazes
    from llm_trm.data.puzzles.maze_generation import symmetry_class

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
