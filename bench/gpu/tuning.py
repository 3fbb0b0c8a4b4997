"""Runs ``llm-trm tune`` in a plan for the products of its cases, with a table in the results folder."""

from __future__ import annotations

import os

import torch

from bench.gpu.context import Context
from llm_trm.benchmark.workloads import Case
from llm_trm.tuning.compiling import ParallelCompiler
from llm_trm.tuning.recording import record_cases
from llm_trm.tuning.timing import measure_on
from llm_trm.tuning.tuner import open_table, pending, this_run, tune
from trm_kernels.ops import dispatch
from trm_kernels.ops._launch import target_of

#: Time limit to compile and time one product's candidates, in seconds.
_PATIENCE = 40.0


def run(context: Context) -> None:
    """Tune the cases' products until the time is over, with one line for each."""
    target = target_of(torch.empty(0, device="cuda"))
    cases = [Case(**case) for case in context.argument["cases"]]
    path = dispatch.user_path(target.name)  # in the results folder, since the supervisor sets TRM_TABLES
    table = open_table(path, target)
    waiting = pending(record_cases(cases, target, fp8=False), table)
    context.doing("starting compilers", _PATIENCE)
    written = 0
    with ParallelCompiler(os.cpu_count()) as compiler:
        measure = measure_on(torch.device("cuda"))
        tuned = tune(
            waiting,
            target,
            table,
            path,
            compiler,
            measure,
            this_run(),
            # The last product may start just before the end.
            budget=context.left - 10.0,
            clock=context.clock,
        )
        for one in tuned:
            context.doing(one.name, _PATIENCE)
            entry = one.entry
            line = {"name": f"tuned: {one.name}", "tried": one.tried, "dropped": one.dropped}
            if entry is None:
                line["reason"] = one.reason
            else:
                written += 1
                line |= {"ms": entry.ms, "heuristic_ms": entry.heuristic_ms, "choice": str(entry.choice)}
            print(line, flush=True)
            context.line(line, "rows.jsonl")
    context.line({"name": "tune", "products": len(waiting), "written": written})
