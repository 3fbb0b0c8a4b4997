"""Formats a case's results as a table for the terminal or as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from llm_trm.benchmark.results import CaseResult, Row

_MISSING = "-"


def number(value: float | None, digits: int = 3) -> str:
    """``value`` with at least ``digits`` significant digits."""
    if value is None:
        return _MISSING
    if value == 0 or not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    leading = 0
    while whole == 0 and abs(value) < 10.0 ** -(leading + 1):
        leading += 1
    return f"{value:.{max(0, digits - whole + leading)}f}"


def _error(row: Row) -> str:
    if row.differs is not None:
        return "other function"
    if not row.errors:
        return _MISSING
    return " / ".join("NaN" if error is None else f"{error:.1e}" for error in row.errors.values())


def _speed(row: Row) -> str:
    if row.status == "ok":
        return number(row.median_ms)
    return "WRONG" if row.status == "wrong" else row.status


def _memory(row: Row) -> str:
    return _MISSING if row.peak_bytes is None else number(row.peak_bytes / 2**20)


def _ratio(baseline: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        if row.backend == baseline:
            return "1"
        return f"{row.speedup[baseline]:.2f}x" if baseline in row.speedup else _MISSING

    return cell


def columns(result: CaseResult) -> dict[str, Callable[[Row], str]]:
    """Headers and cells of a table, in order."""
    gradients = result.case.mode != "forward"
    return {
        "backend": lambda row: row.backend,
        "ms": _speed,
        "p20": lambda row: number(row.p20_ms),
        "p80": lambda row: number(row.p80_ms),
        "TFLOP/s": lambda row: number(row.tflops),
        "of limit": lambda row: _MISSING if row.share is None else f"{row.share:.1%}",
        "peak MiB": _memory,
        "error y / grads" if gradients else "error": _error,
        **{f"vs {baseline}": _ratio(baseline) for baseline in result.baselines()},
    }


def title(result: CaseResult) -> str:
    """One line that describes the case."""
    case = result.case
    what = {
        "forward": f"one latent recursion, {case.forward_calls} network calls",
        "train": f"forward and backward, {case.forward_calls} network calls and {case.backward_calls} back",
        "step": f"a whole training step, {case.forward_calls} network calls and {case.backward_calls} back, "
        "clipping, AdamW and EMA",
    }[case.mode]
    return (
        f"{case.mode}: hidden size {case.hidden_size}, {case.latents} latents, batch {case.batch}, "
        f"{case.layers} layers, {case.heads} heads, {case.family} block, {case.dtype} ({what})"
    )


def footnotes(result: CaseResult) -> list[str]:
    """The measured limit, rows that compute a different function, and reasons for missing values."""
    limit = (
        f"limit {number(result.floor_ms)} ms, from {number(result.matmul_tflops)} TFLOP/s (matrix product) "
        f"and {number(result.copy_gbps)} GB/s (copy) measured in this run"
    )
    others = [
        f"{row.backend}: the same work, but a different function, so it has no error: {row.differs}; "
        f"{number((row.flops or 0) * 1e-9)} GFLOP per call, the others {number(result.case.flops * 1e-9)}"
        for row in result.rows
        if row.differs is not None
    ]
    others += [
        f"{row.backend}: not held to the tolerance rule: {row.coarser}" for row in result.rows if row.coarser
    ]
    return [limit, *others, *(f"{row.backend}: {row.reason}" for row in result.rows if row.reason)]


def terminal_table(result: CaseResult) -> Table:
    """A table for a rich console. A row with a wrong result is red and shows no speed."""
    table = Table(
        title=escape(title(result)),
        caption=Text("\n".join(footnotes(result))),
        title_justify="left",
        caption_justify="left",
    )
    cells = columns(result)
    for header in cells:
        table.add_column(
            header, justify="left" if header == "backend" else "right", no_wrap=header != "backend"
        )
    for row in result.rows:
        style = {"ok": None, "wrong": "bold red"}.get(row.status, "dim")
        table.add_row(*(escape(cell(row)) for cell in cells.values()), style=style)
    return table


def markdown_table(result: CaseResult) -> str:
    """A Markdown table without title and footnotes."""
    cells = columns(result)
    lines: Iterable[list[str]] = [
        list(cells),
        ["---" if header == "backend" else "---:" for header in cells],
        *([cell(row) for cell in cells.values()] for row in result.rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
