"""``llm-trm bench``."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from llm_trm.benchmark.suites import CPU_TRAIN_WIDTH, SUITES, group_of, left_out, shrunk, suite
from llm_trm.benchmark.workloads import Case, Mode
from llm_trm.cli.options.device import device_option
from llm_trm.cli.options.output import output_file
from llm_trm.cli.options.types import BATCH, LAYERS, LENGTH, SECONDS, SEED, WIDTH
from llm_trm.device import resolve_device

if TYPE_CHECKING:
    import torch

    from llm_trm.benchmark.results import CaseResult
    from llm_trm.benchmark.suites import Group

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

#: Seconds of the whole run for each case, by device type; the default three cases on a CPU make 100 s.
_SECONDS_PER_CASE = {"cpu": 100 / 3, "cuda": 60.0, "mps": 60.0}
#: Peers are many, and several of them compile.
_PEERS_TAKE = 3
#: Seconds of timed rounds in each case, where a quarter of the case's share of the budget is not less.
_TIMED_SECONDS = {"cpu": 6.0, "cuda": 3.0, "mps": 6.0}

_EPILOG = "\n".join(["\b", "Suites:", *(f"  {name:<8} {what}" for name, what in SUITES.items())])


def _backend_names(value: str | None) -> tuple[str, ...] | None:
    if value is None:
        return None
    from llm_trm.benchmark.candidates import CANDIDATES

    names = tuple(dict.fromkeys(name.strip() for name in value.split(",") if name.strip()))
    if not names:
        raise click.UsageError(f"--backends: name at least one of {', '.join(CANDIDATES)}")
    for name in names:
        if name not in CANDIDATES:
            raise click.UsageError(
                f"--backends: unknown backend {name!r}: choose from {', '.join(CANDIDATES)}"
            )
    return names


def _writable(context: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    """Refuse an output path before any work is done; nothing is created yet."""
    if output_file(context, parameter, value) is None:
        return None
    assert value is not None
    if parameter.name == "plot":
        if value.suffix not in {".png", ".svg", ".pdf"}:
            raise click.BadParameter(f"{value.name} must end in .png, .svg or .pdf")
        if importlib.util.find_spec("matplotlib") is None:
            raise click.UsageError('--plot needs matplotlib: pip install "llm-trm[plot]"')
    return value


def _cases(
    suite_name: str | None,
    shape: dict[str, int | str | None],
    mode: Mode | None,
    device_type: str,
    dtype: str,
) -> list[Case]:
    """The cases that the options ask for."""
    if dtype == "float16" and mode == "step":
        raise click.UsageError(
            "--mode step: float16 would need loss scaling, which is not measured; use bf16"
        )
    given = {key: value for key, value in shape.items() if value is not None}
    if suite_name is not None:
        if given:
            option = "--" + next(iter(given)).replace("_", "-")
            raise click.UsageError(f"{option} and --suite exclude each other: a suite fixes its shapes")
        cases = suite(suite_name, device_type, dtype, (mode,) if mode else None)
        if not cases:
            raise click.UsageError(
                f"--suite {suite_name} has no case of this mode and dtype on {device_type}"
            )
        return cases
    modes: Sequence[Mode] = (mode,) if mode else ("forward", "train")
    widths = [given.pop("hidden_size")] if "hidden_size" in given else [256, 2048]
    cases = []
    for width in widths:
        for kind in modes:
            # One training step at 2048 takes 13 s on 2 cores; asked for by name, it is run.
            heavy = device_type == "cpu" and kind != "forward" and int(width) > CPU_TRAIN_WIDTH
            if not heavy or mode:
                cases.append(Case(kind, width, **{"latents": 256, "dtype": dtype, **given}))  # type: ignore[arg-type]
    for case in cases:
        try:
            case.config()
        except ValueError as error:
            raise click.UsageError(_in_words_of_the_options(str(error))) from error
    return cases


def _in_words_of_the_options(message: str) -> str:
    for field, option in (("d_model", "--hidden-size"), ("n_heads", "--heads"), ("n_layers", "--layers")):
        message = message.replace(field, option)
    return message


def _check_named_backends(names: Sequence[str], device: torch.device, dtype: str) -> None:
    """Raise click.UsageError if a backend that was asked for by name cannot work on this device."""
    import torch

    from llm_trm.benchmark.candidates import GRAPH, unavailable
    from trm_kernels import TinyRecursiveNetwork, backends

    for name in names:
        reason = unavailable(name, device.type)
        base = name.removesuffix(GRAPH)
        if reason is None and base in backends.BACKENDS:
            kind = getattr(torch, dtype)
            probe = TinyRecursiveNetwork(64).to(device, kind)
            with torch.no_grad():
                reason = backends.refusal(base, probe, torch.randn(1, 16, 64, device=device, dtype=kind))
        if reason is not None:
            raise click.UsageError(f"--backends {name} cannot run here: {reason}")


@click.command(epilog=_EPILOG, short_help="Time the recursion on every backend, with its error.")
@click.option("--latents", type=LENGTH, metavar="L", help="Sequence length. [default: 256]")
@click.option(
    "--hidden-size",
    type=WIDTH,
    metavar="D",
    help="Width. [default: 256, then 2048 (SmolLM3)]",
)
@click.option("--batch", type=BATCH, metavar="B", help="Batch size. [default: 1]")
@click.option("--layers", type=LAYERS, help="Blocks of the network. [default: 2]")
@click.option("--heads", type=WIDTH, help="Attention heads; must divide D. [default: 8]")
@click.option(
    "--family", type=click.Choice(["seed", "scratch", "paper"]), help="Which block. [default: seed]"
)
@click.option(
    "--dtype",
    type=click.Choice([*_DTYPES, *_DTYPES.values()]),
    help="[default: bf16 on CUDA, fp32 elsewhere]",
)
@device_option
@click.option(
    "--backends",
    metavar="NAMES",
    help="Comma-separated, e.g. original,eager,compile. [default: all; those that cannot run say why]",
)
@click.option(
    "--mode",
    type=click.Choice(get_args(Mode)),
    help="forward: one latent recursion (n = 6 latent steps: 7 calls of the network), no gradient. "
    "train: one supervision step: gradients set to None, a deep recursion (T = 3 latent recursions, the "
    "last with gradient), backward from a given gradient of y to parameters and x; no optimizer step. "
    "step: a whole training step, with loss, gradient clipping, AdamW and EMA; parameters in float32. "
    f"[default: forward and train, or what the suite is for. CPU: only forward above D = {CPU_TRAIN_WIDTH}]",
)
@click.option("--suite", "suite_name", type=click.Choice(list(SUITES)), help="A named list of cases.")
@click.option(
    "--quick",
    is_flag=True,
    help="Shrink every case to at most D = 64, L = 32, batch 2, 4 heads: to try a command in seconds.",
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path),
    callback=_writable,
    metavar="FILE",
    help="Append one line of JSON a case: machine, versions, commit, shape, all figures.",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    callback=_writable,
    metavar="FILE.png",
    help='Draw the results. Needs matplotlib: pip install "llm-trm[plot]".',
)
@click.option(
    "--budget",
    type=SECONDS,
    metavar="SECONDS",
    help="Time for the whole run, compiling included; what does not fit is skipped and says so. "
    f"[default: 33 a case on a CPU, 60 elsewhere, {_PEERS_TAKE} times that against peers]",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of weights and inputs.")
def bench(
    latents: int | None,
    hidden_size: int | None,
    batch: int | None,
    layers: int | None,
    heads: int | None,
    family: str | None,
    dtype: str | None,
    device: str,
    backends: str | None,
    mode: Mode | None,
    suite_name: str | None,
    quick: bool,
    json_file: Path | None,
    plot: Path | None,
    budget: float | None,
    seed: int,
) -> None:
    """Time the recursion of a tiny network on every backend, with its error against float64.

    Without options: 256 latents at hidden size 256, one latent recursion and one training step, and at
    2048, the width of SmolLM3. On a 2-core CPU that takes under two minutes.

    All candidates of a case are timed in one process, taking turns round by round; `ms` is the median,
    between the 20th and 80th percentile. `original` is the module that this project replaces, `eager` the
    same with fused attention, `+graph` (on CUDA) replays the whole case as one CUDA graph. `of limit` is
    the time that the machine's own rates, measured in the same run, allow at best, over the median. A
    result whose error exceeds twice eager's is WRONG, and its speed is not printed; the exit code is
    then 1.

    \b
    Examples:
      llm-trm bench --latents 256
      llm-trm bench --hidden-size 512 --batch 8 --mode train --dtype bf16
      llm-trm bench --backends eager,compile --plot speed.png
      llm-trm bench --suite phase2 --json results.jsonl
      llm-trm bench --suite train
      llm-trm bench --suite peers --quick
      llm-trm bench --suite scaling --plot scaling.png
    """
    # Before torch is imported: its profiler (which counts memory on CPUs) logs each start to stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    # Triton 3.10 changes this default; results must not change with it.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    where = resolve_device(device)
    kind = _DTYPES.get(dtype or "", dtype) or ("bfloat16" if where.type == "cuda" else "float32")
    shape: dict[str, int | str | None] = {
        "latents": latents,
        "hidden_size": hidden_size,
        "batch": batch,
        "layers": layers,
        "heads": heads,
        "family": family,
    }
    cases = _cases(suite_name, shape, mode, where.type, kind)
    if quick:
        cases = shrunk(cases)
    elif suite_name and (note := left_out(suite_name, where.type)):
        click.echo(f"{suite_name}: {note}")
    names = _backend_names(backends)
    if names:
        _check_named_backends(names, where, kind)
    from llm_trm.benchmark.runner import DeviceLostError
    from llm_trm.memory import require_memory

    for case in cases:
        require_memory(case.least_bytes, case.name, "choose a smaller shape", where)

    try:
        results = _run(cases, where, names, budget, seed, json_file, group_of(suite_name))
    except DeviceLostError as error:
        raise click.ClickException(f"{error}; leave it out with --backends") from error
    if plot:
        from llm_trm.benchmark import plot as draw

        if suite_name == "scaling":
            draw.plot_scaling(results, plot)
        else:
            draw.plot(results, plot)
    if any(row.status in ("wrong", "failed") for result in results for row in result.rows):
        sys.exit(1)


def _run(
    cases: Sequence[Case],
    device: torch.device,
    named: Sequence[str] | None,
    budget_seconds: float | None,
    seed: int,
    json_file: Path | None,
    group: Group,
) -> list[CaseResult]:
    """Run the cases, printing and recording each as it is done."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from llm_trm.benchmark.candidates import candidates_for
    from llm_trm.benchmark.environment import run_record
    from llm_trm.benchmark.results import append
    from llm_trm.benchmark.runner import Budget, run_case
    from llm_trm.benchmark.table import terminal_table

    rows_of = [(case, named or candidates_for(case, device.type, group)) for case in cases]
    share = _SECONDS_PER_CASE[device.type] * (_PEERS_TAKE if group == "peers" else 1)
    total = budget_seconds or share * len(cases)
    budget = Budget(total, min(_TIMED_SECONDS[device.type], total / len(cases) / 4))
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a pipe has no width, and rich would fold the table into 80 columns
    stderr = Console(stderr=True)
    record = run_record(device)
    versions = record["versions"]
    console.print(
        f"{record['machine']['device']}, torch {versions['torch']}, triton {versions['triton'] or '-'}",
        highlight=False,
    )
    results = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        # Steps of a case: float64, each candidate, the timing.
        task = bar.add_task("", total=sum(len(names) + 2 for _, names in rows_of))
        for number, (case, names) in enumerate(rows_of):
            begun = sum(len(names) + 2 for _, names in rows_of[:number])

            def progress(doing: str, case: Case = case) -> None:
                nonlocal begun
                bar.update(task, description=f"{case.name}: {doing}", completed=begun)
                begun += 1

            progress("limits of this machine")
            result = run_case(case, device, names, budget, progress, seed=seed, group=group)
            results.append(result)
            console.print(terminal_table(result))
            if json_file:
                append(json_file, record | result.to_json())
    return results
