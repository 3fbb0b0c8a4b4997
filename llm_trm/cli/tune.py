"""``llm-trm tune``."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llm_trm.benchmark.suites import suite
from llm_trm.benchmark.workloads import Case, Mode
from llm_trm.cli.options.types import BATCH, LAYERS, LENGTH, MINUTES, WIDTH

if TYPE_CHECKING:
    from llm_trm.tuning.calls import RecordedCall
    from trm_kernels.ops._launch import Target
    from trm_kernels.ops.dispatch import Table

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_SUITES = ("phase2", "latents", "paper", "train", "all")
_MODES: tuple[Mode, ...] = ("forward", "train", "step")


def _cases(suite_name: str | None, shape: dict[str, int | str | None], dtype: str) -> list[Case]:
    """What to record the products of."""
    given: dict[str, Any] = {name: value for name, value in shape.items() if value is not None}
    if given and suite_name:
        option = "--" + next(iter(given)).replace("_", "-")
        raise click.UsageError(f"{option} and --suite exclude each other: a suite fixes its shapes")
    if not given:
        return suite(suite_name or "all", "cuda", dtype)
    modes = _MODES if dtype != "float16" else _MODES[:2]
    cases = [Case(mode, **{"hidden_size": 256, "latents": 256, "dtype": dtype, **given}) for mode in modes]
    try:
        cases[0].config()
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    return cases


def _target(dry_run: bool) -> Target:
    """The GPU's target; for a dry run without one, an H100's."""
    from trm_kernels import ops

    if ops.INTERPRET:
        raise click.UsageError("TRITON_INTERPRET=1 runs kernels in Python: unset it to tune")
    if ops.UNAVAILABLE is None:
        import torch

        from trm_kernels.ops._launch import target_of

        return target_of(torch.empty(0, device="cuda"))
    if not dry_run:
        raise click.UsageError(
            f"nothing can be measured here: {ops.UNAVAILABLE} (--dry-run lists the problems)"
        )
    try:
        from trm_kernels.ops._launch import TARGETS
    except ImportError as error:
        raise click.UsageError(f"{ops.UNAVAILABLE}") from error
    return TARGETS["sm_90"]


@click.command(short_help="Measure which tile, and Triton or cuBLAS, is fastest for each product.")
@click.option("--suite", "suite_name", type=click.Choice(_SUITES), help="Shapes of a suite. [default: all]")
@click.option("--hidden-size", type=WIDTH, metavar="D", help="Width, instead of a suite.")
@click.option("--batch", type=BATCH, metavar="B", help="Batch size. [default: 1]")
@click.option("--latents", type=LENGTH, metavar="L", help="Sequence length. [default: 256]")
@click.option("--layers", type=LAYERS, help="Blocks of the network. [default: 2]")
@click.option("--heads", type=WIDTH, help="Attention heads; must divide D. [default: 8]")
@click.option(
    "--family", type=click.Choice(["seed", "scratch", "paper"]), help="Which block. [default: seed]"
)
@click.option(
    "--dtype",
    type=click.Choice([*_DTYPES, *_DTYPES.values()]),
    default="bf16",
    show_default=True,
    help="Of the operands; bf16 on sm_90 and newer covers fp8 too.",
)
@click.option(
    "--budget",
    type=MINUTES,
    default=10.0,
    show_default=True,
    metavar="MINUTES",
    help="No problem is begun after this time; the next run goes on from there.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Where to write. [default: the user's own table, which then decides]",
)
@click.option("--packaged", is_flag=True, help="Write the table inside the package (from a checkout).")
@click.option("--dry-run", is_flag=True, help="List problems and candidates; needs no GPU.")
@click.option("--check", is_flag=True, help="Measure nothing; exit code 1 if an entry is missing or stale.")
def tune(
    suite_name: str | None,
    hidden_size: int | None,
    batch: int | None,
    latents: int | None,
    layers: int | None,
    heads: int | None,
    family: str | None,
    dtype: str,
    budget: float,
    output: Path | None,
    packaged: bool,
    dry_run: bool,
    check: bool,
) -> None:
    """Measure, on this GPU, which tile and route is fastest for each matrix product of a recursion.

    The products are those that the recursion itself asks for at the given shapes; rows (batch times length)
    count by their nearest power of two. Candidates that spill registers or do not fit are dropped before
    they are timed, the others take turns. Results are written after every product, so that an interrupted
    run goes on where it stopped; products whose kernel has not changed are not measured again.

    \b
    Examples:
      llm-trm tune
      llm-trm tune --suite phase2 --budget 3
      llm-trm tune --hidden-size 512 --batch 64 --latents 97 --family paper
      llm-trm tune --dry-run
    """
    if output and packaged:
        raise click.UsageError("--output and --packaged exclude each other")
    shape: dict[str, int | str | None] = {
        "hidden_size": hidden_size,
        "batch": batch,
        "latents": latents,
        "layers": layers,
        "heads": heads,
        "family": family,
    }
    cases = _cases(suite_name, shape, _DTYPES.get(dtype, dtype))
    target = _target(dry_run)
    from llm_trm.tuning.recording import record_cases
    from llm_trm.tuning.tuner import open_table, pending
    from trm_kernels.ops import dispatch

    calls = record_cases(cases, target)
    if dry_run:
        _list(calls, target)
        return
    place = dispatch.packaged_path if packaged else dispatch.user_path
    path = output or place(target.name)
    try:
        table = open_table(path, target)
    except dispatch.TableError as error:
        raise click.UsageError(f"{error}; delete it or name another with --output") from error
    waiting = pending(calls, table)
    if check:
        _check(calls, waiting, table, path)
    elif not waiting:
        click.echo(f"{path}: all {len(calls)} products are measured")
    else:
        _tune(waiting, target, table, path, budget * 60)


def _list(calls: Sequence[RecordedCall], target: Target) -> None:
    from llm_trm.tuning.candidates import candidates
    from trm_kernels.ops import dispatch

    total = 0
    for call in calls:
        found = candidates(call.problem, target)
        total += len(found)
        tile = found[0].tile
        first = f"{tile.m}x{tile.n}x{tile.k} w{tile.warps} s{tile.stages}"
        click.echo(f"{dispatch.key(call.problem):<76} {len(found):>4} candidates, heuristic {first}")
    name = target.name or f"sm_{target.arch} (no GPU here)"
    click.echo(f"{len(calls)} problems, {total} candidates for {name}")


def _check(calls: Sequence[RecordedCall], waiting: Sequence[RecordedCall], table: Table, path: Path) -> None:
    from trm_kernels.ops import dispatch

    for call in waiting:
        name = dispatch.key(call.problem)
        click.echo(f"{'stale' if name in table.entries else 'missing'}: {name}")
    for text in table.flaws:
        click.echo(f"broken: {text}")
    click.echo(f"{path}: {len(calls) - len(waiting)} of {len(calls)} products are measured")
    if waiting or table.flaws:
        sys.exit(1)


def _tune(waiting: Sequence[RecordedCall], target: Target, table: Table, path: Path, budget: float) -> None:
    """Measure, with a progress bar, and print what was found."""
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from llm_trm.tuning.compiling import ParallelCompiler
    from llm_trm.tuning.timing import measure_on
    from llm_trm.tuning.tuner import this_run
    from llm_trm.tuning.tuner import tune as run

    stderr = Console(stderr=True)
    done = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        ParallelCompiler() as compiler,
        Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar,
    ):
        task = bar.add_task(target.name, total=len(waiting))
        measure = measure_on(torch.device("cuda"))
        for tuned in run(waiting, target, table, path, compiler, measure, this_run(), budget=budget):
            done.append(tuned)
            bar.update(task, advance=1, description=tuned.name)
    _print(done)
    left = len(waiting) - len(done)
    written = Counter(tuned.entry is not None for tuned in done)[True]
    rest = f"; {left} are left for the next run (--budget)" if left else ""
    click.echo(f"{path}: {written} products written{rest}")


def _print(done: Sequence[Any]) -> None:
    from rich.console import Console
    from rich.table import Table as Grid

    grid = Grid("problem", "heuristic ms", "best ms", "ratio", "choice", box=None, pad_edge=False)
    for tuned in done:
        entry = tuned.entry
        if entry is None:
            grid.add_row(tuned.name, "-", "-", "-", tuned.reason)
            continue
        tile, base = entry.choice.tile, entry.heuristic_ms
        choice = f"{entry.choice.route} {tile.m}x{tile.n}x{tile.k} w{tile.warps} s{tile.stages}"
        choice += f" splits {entry.choice.splits}" if entry.choice.splits > 1 else ""
        times = ("-", f"{entry.ms:.4f}", "-") if base is None else (
            f"{base:.4f}", f"{entry.ms:.4f}", f"{base / entry.ms:.2f}"
        )  # fmt: skip
        grid.add_row(tuned.name, *times, choice)
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a pipe has no width, and rich would fold the table into 80 columns
    console.print(grid)
