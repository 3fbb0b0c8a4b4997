"""Runs a case of the benchmark: checks every candidate against float64, then times them in rounds."""

from __future__ import annotations

import gc
from typing import Any

import torch

from bench.gpu.context import PATIENCE, BrokenDeviceError, Context
from llm_trm.benchmark.candidates import CANDIDATES, candidates_for
from llm_trm.benchmark.results import CaseResult, Row
from llm_trm.benchmark.runner import Budget, DeviceLostError, run_case
from llm_trm.benchmark.table import footnotes, markdown_table, title
from llm_trm.benchmark.workloads import Case

#: Prefix of this library's rows. A wrong one fails the task, but its result is saved.
_OURS = "triton"
#: Expected time of torch.compile for a forward case; updated by measurements.
_compile_seconds = 10.0
#: Time limits for candidates that compile.
_PATIENCE_COMPILE, _PATIENCE_MAX_AUTOTUNE = 60.0, 120.0


def patience(doing: str) -> float:
    """Seconds after which a step of a case counts as hanging."""
    candidate = CANDIDATES.get(doing)
    if candidate is None or candidate.compiles == 0.0:
        return PATIENCE
    return _PATIENCE_MAX_AUTOTUNE if candidate.compiles > 1.0 else _PATIENCE_COMPILE


def run(context: Context) -> None:
    """Measure the case. Emits a line for each row as it becomes available, and one for the complete result.

    Raises:
        AssertionError: A row of this library is wrong or failed.
        BrokenDeviceError: A candidate made the device unusable for this process.
    """
    global _compile_seconds
    gc.collect()  # the last case's graphs are in reference cycles
    torch.cuda.empty_cache()
    argument = context.argument
    case, group = Case(**argument["case"]), argument["group"]
    device = torch.device("cuda")
    names = argument["names"] or candidates_for(case, "cuda", group)
    budget = Budget(context.left, argument["timed"], _compile_seconds, context.clock)

    def on_row(row: Row) -> None:
        context.line({"name": context.task.name} | _row(row), "rows.jsonl")

    try:
        result = run_case(
            case,
            device,
            names,
            budget,
            lambda doing: context.doing(doing, patience(doing)),
            excluded=context.excluded,
            group=group,
            on_row=on_row,
            early_seconds=argument["timed"] / 4,
        )
    except DeviceLostError as error:
        raise BrokenDeviceError(error.backend, str(error)) from error
    finally:
        _compile_seconds = budget.compile_seconds
    tuned = {"tuned": True} if argument["tuned"] else {}
    context.line(result.to_json() | tuned, "tuned.jsonl" if tuned else "gpu.jsonl")
    _show(result)
    bad = [row for row in result.rows if row.status in ("wrong", "failed") and row.backend.startswith(_OURS)]
    if bad:
        raise AssertionError("; ".join(f"{row.backend} {row.status}: {row.reason}" for row in bad))


def _row(row: Row) -> dict[str, Any]:
    """The non-empty fields of a row."""
    return {name: value for name, value in vars(row).items() if value not in (None, {}, 0)}


def _show(result: CaseResult) -> None:
    print(f"\n{title(result)}\n{markdown_table(result)}")
    print("\n".join(footnotes(result)), flush=True)
