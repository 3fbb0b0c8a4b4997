"""A made-up result for tests of reports."""

from __future__ import annotations

from typing import Any

from llm_trm.benchmark.results import CaseResult, Row, add_speedups
from llm_trm.benchmark.workloads import Case


def sample_result(mode: Any = "forward", device: str = "Abacus") -> CaseResult:
    """Two timed rows, a wrong one and one that was not run."""
    rows = [
        Row("original", "ok", None, 4.0, 3.9, 4.1, 9, 0.5, 0.1, 2**20, {"output": 1e-7}),
        Row("eager", "ok", None, 2.0, 1.9, 2.1, 9, 1.0, 0.2, 2**20, {"output": 1e-7}),
        Row("native", "wrong", "output: error 1", errors={"output": None}),
        Row("triton", "not run", "no GPU"),
    ]
    add_speedups(rows)
    return CaseResult(Case(mode, 64, 16), device, 0.4, 1.0, 10.0, rows)
