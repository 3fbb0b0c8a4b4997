"""``llm-trm data arc``."""

from __future__ import annotations

from pathlib import Path

import click

from llm_trm.cli.bars import progress_bar
from llm_trm.cli.options.types import FOLDER, PATH, number
from llm_trm.errors import InputError
from llm_trm.ranges import SEED, SYMMETRIES
from llm_trm.shared_settings import REPLACE_PUZZLES


@click.command(short_help="Write ARC tasks under many symmetries.")
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=PATH)
@click.option(
    "--evaluation",
    type=PATH,
    multiple=True,
    help="Hold out only the test pairs of these tasks, and train on all pairs of the tasks in PATH. May be "
    "repeated. [default: the test pairs of all tasks are held out]",
)
@click.option(
    "--augment",
    type=number(SYMMETRIES),
    default=100,
    show_default=True,
    help="Number of symmetries per task, in addition to the task itself. The paper uses 1000.",
)
@click.option("--seed", type=number(SEED), default=0, show_default=True, help="Seed for the symmetries.")
@click.option(
    "-o",
    "--output",
    type=FOLDER,
    default=Path("data/arc"),
    show_default=True,
    help="Folder to write.",
)
@click.option("--overwrite", is_flag=True, help=REPLACE_PUZZLES)
def arc(
    paths: tuple[Path, ...],
    evaluation: tuple[Path, ...],
    augment: int,
    seed: int,
    output: Path,
    overwrite: bool,
) -> None:
    """Write ARC tasks as grids of 30 x 30 tokens, each task under many symmetries.

    PATH is a folder with one JSON file per task, a single such file, or a *_challenges.json file of the ARC
    Prize with the *_solutions.json file next to it. The colours are permuted, except black, and the grids are
    rotated and mirrored. Each task under each symmetry has its own puzzle identifier, listed in arc.json. The
    pairs that demonstrate a task are always trained on. A task of --evaluation that is also in PATH, under
    the same name or another, is held out.

    \b
    Examples:
      llm-trm data arc ARC-AGI/data/training --evaluation ARC-AGI/data/evaluation
      llm-trm data arc arc-agi_evaluation2_challenges.json --augment 1000 -o data/arc2
    """
    from llm_trm.data.puzzles.dataset import ARC_FILE, new_puzzles

    with new_puzzles(output, overwrite=overwrite, others=(ARC_FILE,)):
        _write(paths, evaluation, augment, seed, output)
    click.echo(f"written to {output}")


def _write(
    paths: tuple[Path, ...], evaluation: tuple[Path, ...], augment: int, seed: int, output: Path
) -> None:
    from llm_trm.data.puzzles.arc_files import is_labelled, merged, read_tasks
    from llm_trm.data.puzzles.arc_folder import write_arc
    from llm_trm.data.puzzles.arc_overlap import learnable, without_tests
    from llm_trm.data.puzzles.arc_splits import plan_tasks

    tasks = merged((path, read_tasks(path)) for path in paths)
    tested = merged((path, read_tasks(path)) for path in evaluation) if evaluation else tasks
    names = {task.name for task in tested}
    learned = [task for task in tasks if task.name not in names]
    if both := len(tasks) - len(learned) if evaluation else 0:
        click.echo(f"held out, since --evaluation has them too: {both} of PATH", err=True)
    learned, twins = learnable(tested, learned)
    if twins:
        click.echo(f"held out, since --evaluation has them under other names: {_such_as(twins)}", err=True)
    tested, shown = without_tests(tested)
    if others := [pair for pair in shown if pair[0] != pair[1]]:
        click.echo(
            f"demonstrations left out, since they are tests of another task: {_such_as(others)}", err=True
        )
    if own := [name for name, other in shown if name == other]:
        click.echo(
            f"demonstrations left out, since they are tests of their own task: {len(own)}, such as {own[0]}",
            err=True,
        )
    if not learned and not any(task.train for task in tested):
        raise InputError(
            "no pairs are left to train on, since all demonstrations are test pairs: give more tasks, or "
            "whole ones with --evaluation"
        )
    with progress_bar("tasks", len(tested) + len(learned)) as progress:
        plan = plan_tasks(tested, learned, augment, seed, progress)
    sizes = plan.sizes
    size = 2 * 900 * sum(sizes.values()) / 1e9
    click.echo(
        f"tasks: {len(plan.tasks)}, with their symmetries {plan.num_puzzles - 1}; {sizes['train']} pairs to "
        f"train on, {sizes['test']} held out; {size:.1f} GB"
    )
    if unsolved := [task.name for task in tested if not is_labelled(task)]:
        click.echo(
            f"held out without solutions: {len(unsolved)}, such as {unsolved[0]}; their labels are 0, and "
            "are ignored",
            err=True,
        )
    if short := sum(len(group) <= augment for group in plan.transforms):
        click.echo(f"tasks with fewer than {augment} different symmetries: {short}", err=True)
    facts = {
        "source": [str(path) for path in paths],
        "evaluation": [str(path) for path in evaluation],
        "augment": augment,
        "seed": seed,
    }
    with progress_bar("pairs", sum(sizes.values())) as progress:
        write_arc(output, plan, facts, progress)


def _such_as(pairs: list[tuple[str, str]]) -> str:
    return f"{len(pairs)}, such as {pairs[0][0]} ({pairs[0][1]})"
