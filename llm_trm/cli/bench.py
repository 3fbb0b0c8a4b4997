"""``llm-trm bench``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llm_trm.benchmark.suites import CPU_TRAIN_WIDTH, SUITES, group_of, left_out, shrunk, suite
from llm_trm.benchmark.workloads import Case, Mode
from llm_trm.choices import DeviceName
from llm_trm.cli.bars import passing_bar
from llm_trm.cli.options.new_files import require_new_files
from llm_trm.cli.options.settings import settings_options
from llm_trm.cli.options.shape import Dtype, Shape, full_name, reject_shape
from llm_trm.cli.tables import table_console
from llm_trm.device import resolve_device
from llm_trm.extras import require_plot
from llm_trm.ranges import SECONDS, SEED, shown
from llm_trm.settings import Settings, setting
from llm_trm.shared_settings import device, output_file, overwrite

if TYPE_CHECKING:
    import torch

    from llm_trm.benchmark.results import CaseResult
    from llm_trm.benchmark.suites import Group

#: Seconds per case of a whole run, by device type; the three default cases on a CPU take 100 s.
_SECONDS_PER_CASE = {"cpu": 100 / 3, "cuda": 60.0, "mps": 60.0}
#: Factor of the time of a case with peers: there are many, and several compile.
_PEERS_FACTOR = 3
#: Seconds of timed rounds per case, or a quarter of the case's share of the budget if that is less.
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
                f"--backends: unknown backend {shown(name)}: choose from {', '.join(CANDIDATES)}"
            )
    return names


def _cases(
    suite_name: str | None, shape: Shape, mode: Mode | None, device_type: str, dtype: str
) -> list[Case]:
    """The cases that the options select."""
    if dtype == "float16" and mode == "step":
        raise click.UsageError(
            "--mode step: float16 would need loss scaling, which is not measured; use bf16"
        )
    if suite_name is not None:
        cases = suite(suite_name, device_type, dtype, (mode,) if mode else None)
        if not cases:
            raise click.UsageError(
                f"--suite {suite_name} has no case of this mode and dtype on {device_type}"
            )
        return cases
    modes: Sequence[Mode] = (mode,) if mode else ("forward", "train")
    widths = [256, 2048] if shape.hidden_size is None else [shape.hidden_size]
    cases = [shape.case(kind, dtype, hidden_size=width) for width in widths for kind in modes]
    # One training step at 2048 takes 13 s on 2 cores; --mode asks for it.
    return [case for case in cases if mode or not _heavy(case, device_type)]


def _heavy(case: Case, device_type: str) -> bool:
    return device_type == "cpu" and case.mode != "forward" and case.hidden_size > CPU_TRAIN_WIDTH


def _check_named_backends(names: Sequence[str], device: torch.device, dtype: str) -> None:
    """Raise click.UsageError if a backend of ``--backends`` cannot run on this device."""
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


@dataclass(frozen=True)
class BenchSettings(Settings):
    """Options of ``llm-trm bench`` other than ``--suite``."""

    shape: Shape = field(default_factory=Shape)
    dtype: Dtype | None = setting(None, "Precision of the network.", unset="bf16 on CUDA, fp32 elsewhere")
    device: DeviceName = device()
    backends: str | None = setting(
        None,
        "Comma-separated, for example original,eager,compile. If one cannot run, the reason is printed.",
        metavar="NAMES",
        unset="all",
    )
    mode: Mode | None = setting(
        None,
        "forward: one latent recursion (n = 6 latent steps: 7 calls of the network), no gradient. "
        "train: one supervision step: gradients set to None, a deep recursion (T = 3 latent recursions, the "
        "last with gradient), backward from a given gradient of y to parameters and x; no optimizer step. "
        "step: a whole training step, with loss, gradient clipping, AdamW and EMA; parameters in float32.",
        unset="forward and train, or the modes of the suite; on a CPU only forward above D = "
        f"{CPU_TRAIN_WIDTH}",
    )
    quick: bool = setting(
        False, "Shrink every case to at most D = 64, L = 32, batch 2, 4 heads, to try a command in seconds."
    )
    json_file: Path | None = output_file(
        "Append one line of JSON per case to this file: machine, versions, commit, shape, all results.",
        "--json",
    )
    plot: Path | None = output_file(
        'Draw the results as .png, .svg or .pdf. Needs matplotlib: pip install "llm-trm[plot]".', "--plot"
    )
    overwrite: bool = overwrite("Replace the file of --plot if it exists.")
    budget: float | None = setting(
        None,
        "Seconds for the whole run, including compilation; cases that do not fit are skipped and reported.",
        SECONDS,
        metavar="SECONDS",
        unset=f"33 per case on a CPU, 60 elsewhere, {_PEERS_FACTOR} times that against peers",
    )
    seed: int = setting(0, "Seed for weights and inputs.", SEED)


@click.command(epilog=_EPILOG, short_help="Measure the speed and the error of every backend.")
@click.option(
    "--suite", "suite_name", type=click.Choice(list(SUITES)), help="A named list of cases; see below."
)
@settings_options(BenchSettings, {"hidden_size": "256, then 2048 (SmolLM3)"}, config_file=False)
@click.pass_context
def bench(context: click.Context, /, suite_name: str | None, given: dict[str, Any]) -> None:
    """Time the recursion of a tiny network on every backend, with its error against float64.

    Without options, it measures 256 latents at width 256 (one latent recursion and one training step), and
    at 2048, the width of SmolLM3. On a 2-core CPU that takes under two minutes.

    All candidates of a case are timed in one process, taking turns round by round; `ms` is the median, with
    the 20th and 80th percentile. `original` is the module that this project replaces, `eager` the same with
    fused attention; `+graph` (on CUDA) replays the whole case as one CUDA graph. `of limit` is the shortest
    time that this machine allows, calculated from rates measured in the same run, divided by the median. A
    result whose error exceeds twice that of eager is WRONG: its speed is not printed, and the exit code is 1.

    \b
    Examples:
      llm-trm bench --latents 256
      llm-trm bench --d-model 512 --batch-size 8 --mode train --dtype bf16
      llm-trm bench --backends eager,compile --plot speed.png
      llm-trm bench --suite phase2 --json results.jsonl
      llm-trm bench --suite train
      llm-trm bench --suite peers --quick
      llm-trm bench --suite scaling --plot scaling.png
    """
    # Before torch is imported: its profiler, which counts memory on CPUs, would log each start to stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    # Triton 3.10 changes this default; results must not change with it.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    asked = BenchSettings(**given)
    if suite_name is not None:
        reject_shape(context)
    if asked.plot is not None:
        require_plot(asked.plot)
    require_new_files({"--plot": asked.plot}, overwrite=asked.overwrite, inputs=[asked.json_file])
    if asked.json_file is not None:
        from llm_trm.benchmark.results import require_results

        require_results(asked.json_file, "--json")
    where = resolve_device(asked.device)
    dtype = full_name(asked.dtype or ("bf16" if where.type == "cuda" else "fp32"))
    cases = _cases(suite_name, asked.shape, asked.mode, where.type, dtype)
    if asked.quick:
        cases = shrunk(cases)
    elif suite_name and (note := left_out(suite_name, where.type)):
        click.echo(f"{suite_name}: {note}")
    names = _backend_names(asked.backends)
    if names:
        _check_named_backends(names, where, dtype)
    from llm_trm.benchmark.runner import DeviceLostError
    from llm_trm.memory import require_memory

    for case in cases:
        require_memory(case.least_bytes, case.name, "choose a smaller shape", where)

    try:
        results = _run(cases, where, names, asked, group_of(suite_name))
    except DeviceLostError as error:
        raise click.ClickException(f"{error}; leave it out with --backends") from error
    if asked.plot is not None:
        from llm_trm.benchmark.plot import plot, plot_scaling

        (plot_scaling if suite_name == "scaling" else plot)(results, asked.plot)
    if any(row.status in ("wrong", "failed") for result in results for row in result.rows):
        sys.exit(1)


def _run(
    cases: Sequence[Case],
    device: torch.device,
    named: Sequence[str] | None,
    asked: BenchSettings,
    group: Group,
) -> list[CaseResult]:
    """Run the cases; print and record the results of each."""
    from llm_trm.benchmark.candidates import candidates_for
    from llm_trm.benchmark.environment import run_record
    from llm_trm.benchmark.results import append
    from llm_trm.benchmark.runner import Budget, run_case
    from llm_trm.benchmark.table import terminal_table

    rows_of = [(case, named or candidates_for(case, device.type, group)) for case in cases]
    share = _SECONDS_PER_CASE[device.type] * (_PEERS_FACTOR if group == "peers" else 1)
    total = asked.budget or share * len(cases)
    budget = Budget(total, min(_TIMED_SECONDS[device.type], total / len(cases) / 4))
    console = table_console()
    record = run_record(device)
    versions = record["versions"]
    console.print(
        f"{record['machine']['device']}, torch {versions['torch']}, triton {versions['triton'] or '-'}"
    )
    results = []
    with passing_bar() as bar:
        # Steps of a case: float64, each candidate, the timing.
        task = bar.add_task("", total=sum(len(names) + 2 for _, names in rows_of), numbers="")
        for number, (case, names) in enumerate(rows_of):
            done = sum(len(names) + 2 for _, names in rows_of[:number])

            def progress(doing: str, case: Case = case) -> None:
                nonlocal done
                bar.update(task, description=f"{case.name}: {doing}", completed=done)
                done += 1

            progress("limits of this machine")
            result = run_case(case, device, names, budget, progress, seed=asked.seed, group=group)
            results.append(result)
            console.print(terminal_table(result))
            if asked.json_file is not None:
                append(asked.json_file, record | result.to_json())
    return results
