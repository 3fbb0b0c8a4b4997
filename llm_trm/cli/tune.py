"""``llm-trm tune``."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from llm_trm.benchmark.suites import suite
from llm_trm.benchmark.workloads import Case, Mode
from llm_trm.cli.bars import passing_bar
from llm_trm.cli.options.settings import settings_options
from llm_trm.cli.options.shape import Dtype, Shape, full_name, reject_shape
from llm_trm.cli.tables import table_console
from llm_trm.errors import InputError, Interrupted
from llm_trm.ranges import MINUTES
from llm_trm.settings import Settings, setting

if TYPE_CHECKING:
    from llm_trm.tuning.calls import RecordedCall
    from trm_kernels.ops._launch import Target
    from trm_kernels.ops.dispatch import Table

_MODES: tuple[Mode, ...] = ("forward", "train", "step")


@dataclass(frozen=True)
class TuneSettings(Settings):
    """Options of ``llm-trm tune``."""

    suite: Literal["phase2", "latents", "paper", "train", "all"] | None = setting(
        None, "Shapes of a suite.", unset="all, if no shape is given"
    )
    shape: Shape = field(default_factory=Shape)
    dtype: Dtype = setting("bf16", "Precision of the operands; bf16 includes fp8 on sm_90 and newer.")
    budget: float = setting(
        10.0, "Start no product after this time; the next run continues there.", MINUTES, metavar="MINUTES"
    )
    # Not shared_settings.output_file, whose folder must exist: this one is created.
    output: Path | None = setting(
        None,
        "Table to write. The measurements of a table that exists stay.",
        None,
        "-o",
        "--output",
        metavar="FILE",
        unset="the user's own table, which takes precedence",
        file="read",
    )
    packaged: bool = setting(False, "Write the table inside the package (from a checkout).")
    dry_run: bool = setting(False, "List products and candidates; needs no GPU.")
    check: bool = setting(False, "Measure nothing; exit with 1 if an entry is missing or stale.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output and self.packaged:
            raise InputError("--output and --packaged cannot be used together: leave one of them out")

    def cases(self) -> list[Case]:
        """The cases whose products are tuned."""
        dtype = full_name(self.dtype)
        if self.shape == Shape():
            return suite(self.suite or "all", "cuda", dtype)
        modes = _MODES if dtype != "float16" else _MODES[:2]
        return [self.shape.case(mode, dtype) for mode in modes]


def _target(dry_run: bool) -> Target:
    """The target of the GPU; for a dry run without a GPU, that of an H100."""
    from trm_kernels import ops

    if ops.INTERPRET:
        raise click.UsageError("TRITON_INTERPRET=1 runs kernels in Python: unset it to tune")
    if ops.UNAVAILABLE is None:
        import torch

        from trm_kernels.ops._launch import target_of

        return target_of(torch.empty(0, device="cuda"))
    if not dry_run:
        raise click.UsageError(
            f"nothing can be measured here: {ops.UNAVAILABLE} (--dry-run lists the products)"
        )
    try:
        from trm_kernels.ops._launch import TARGETS
    except ImportError as error:
        raise click.UsageError(f"{ops.UNAVAILABLE}") from error
    return TARGETS["sm_90"]


@click.command(short_help="Find the fastest tile and route (Triton or cuBLAS) for each product.")
@settings_options(TuneSettings, config_file=False)
@click.pass_context
def tune(context: click.Context, /, given: dict[str, Any]) -> None:
    """Measure, on this GPU, which tile and route is fastest for each matrix product of a recursion.

    The products are those of the recursion at the given shapes; the number of rows (batch times length) is
    rounded to the nearest power of two. Candidates that spill registers or do not fit are dropped before
    they are timed; the others take turns. Results are written after every product, so that the next run
    continues after an interruption. Products whose kernel has not changed are not measured again.

    \b
    Examples:
      llm-trm tune
      llm-trm tune --suite phase2 --budget 3
      llm-trm tune --d-model 512 --batch-size 64 --latents 97 --family paper
      llm-trm tune --dry-run
    """
    asked = TuneSettings(**given)
    if asked.suite is not None:
        reject_shape(context)
    cases = asked.cases()
    target = _target(asked.dry_run)
    from llm_trm.files import require_writable
    from llm_trm.tuning.recording import record_cases
    from llm_trm.tuning.tuner import open_table, pending
    from trm_kernels.ops import dispatch

    calls = record_cases(cases, target)
    if asked.dry_run:
        _list(calls, target)
        return
    place = dispatch.packaged_path if asked.packaged else dispatch.user_path
    path = asked.output or place(target.name)
    try:
        table = open_table(path, target)
    except dispatch.TableError as error:
        raise click.UsageError(f"{error}; delete it or name another with --output") from error
    waiting = pending(calls, table)
    if asked.check:
        _check(calls, waiting, table, path)
    elif not waiting:
        click.echo(f"{path}: all {len(calls)} products are measured")
    else:
        require_writable(path.parent)
        _tune(waiting, target, table, path, asked.budget * 60)


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
    click.echo(f"{len(calls)} products, {total} candidates for {name}")


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
    """Measure with a progress bar, and print the results."""
    import torch

    from llm_trm.tuning.compiling import ParallelCompiler
    from llm_trm.tuning.timing import measure_on
    from llm_trm.tuning.tuner import this_run
    from llm_trm.tuning.tuner import tune as run

    done = []
    with ParallelCompiler() as compiler, passing_bar() as bar:
        task = bar.add_task(target.name, total=len(waiting), numbers="")
        measure = measure_on(torch.device("cuda"))
        try:
            for tuned in run(waiting, target, table, path, compiler, measure, this_run(), budget=budget):
                done.append(tuned)
                bar.update(task, advance=1, description=tuned.name)
        except KeyboardInterrupt as error:
            kept = f"stopped after {len(done)} of {len(waiting)} products; the next run continues in {path}"
            raise Interrupted.during(error, kept) from error
    _print(done)
    left = len(waiting) - len(done)
    written = Counter(tuned.entry is not None for tuned in done)[True]
    rest = f"; {left} remain for the next run (--budget)" if left else ""
    click.echo(f"{path}: {written} products written{rest}")


def _print(done: Sequence[Any]) -> None:
    from rich.table import Table as Grid

    grid = Grid("product", "heuristic ms", "best ms", "ratio", "choice", box=None, pad_edge=False)
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
    table_console().print(grid)
