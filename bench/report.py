"""Draws the docs' tables and plots from ``bench/results/*.jsonl``: ``python -m bench.report``.

Rewrites what stands between ``<!-- bench:begin -->`` and ``<!-- bench:end -->`` in docs/benchmarks.md (every
table) and README.md (one line a case), and one plot a device under docs/. No figure is written by hand.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_trm.benchmark.plot import plot
from llm_trm.benchmark.results import CaseResult, read
from llm_trm.benchmark.table import footnotes, markdown_table, number, title

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


@dataclass
class DeviceReport:
    """The latest result of every case on one device, and the run of each."""

    device: str
    results: list[CaseResult]
    runs: list[dict[str, Any]]

    @property
    def is_gpu(self) -> bool:
        """Whether the results come from a CUDA or ROCm device."""
        return bool(self.runs[0]["machine"]["device_type"] == "cuda")

    @property
    def plot_name(self) -> str:
        """File name of the device's plot."""
        slug = re.sub("[^a-z0-9]+", "-", self.device.lower()).strip("-")
        return f"benchmarks-{slug}.png"

    def provenance(self) -> str:
        """Versions, commits and days behind the results."""
        found: dict[str, None] = {}
        for run in self.runs:
            versions = run["versions"]
            found[
                f"torch {versions['torch']}, triton {versions['triton'] or '-'}, "
                f"commit {(run['commit'] or 'unknown')[:13]}, {run['time'][:10]}"
            ] = None
        return "; ".join(found)


def load(folder: Path) -> list[DeviceReport]:
    """Read every results file of a folder; of two lines for one case and device the later counts."""
    latest: dict[str, dict[str, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in read(path):
            if "rows" not in line:
                continue
            cases = latest.setdefault(line["device"], {})
            if line["name"] not in cases or cases[line["name"]]["time"] <= line["time"]:
                cases[line["name"]] = line
    return [
        DeviceReport(device, [CaseResult.from_json(line) for line in cases.values()], list(cases.values()))
        for device, cases in sorted(latest.items())
    ]


def details(reports: list[DeviceReport]) -> str:
    """Every table, a section a device."""
    parts = []
    for report in reports:
        parts += [f"## {report.device}", report.provenance() + ".", f"![{report.device}]({report.plot_name})"]
        for result in report.results:
            notes = "\n".join(f"- {note}" for note in footnotes(result))
            parts += [f"**{title(result)}**", markdown_table(result), notes]
    return "\n\n".join(parts + _missing(reports))


def summary(reports: list[DeviceReport]) -> str:
    """One line a case: median milliseconds of every candidate that was timed."""
    parts = []
    for report in reports:
        names = list(
            dict.fromkeys(row.backend for result in report.results for row in result.rows if row.median_ms)
        )
        lines = [["ms", "limit", *names], ["---"] + ["---:"] * (len(names) + 1)]
        for result in report.results:
            medians = {row.backend: row.median_ms for row in result.rows if row.median_ms is not None}
            cells = [number(medians[name]) if name in medians else "-" for name in names]
            lines.append([result.case.name, number(result.floor_ms), *cells])
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        parts += [f"{report.device} ({report.provenance()}):", table]
    return "\n\n".join(parts + _missing(reports))


def _missing(reports: list[DeviceReport]) -> list[str]:
    return [] if any(report.is_gpu for report in reports) else ["On a GPU: not measured yet."]


def rewrite(path: Path, text: str) -> bool:
    """Put ``text`` between the markers of a file; False if it has none."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        return False
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")
    return True


def main(root: Path = ROOT) -> None:
    """Redraw everything; exit code 1 if a document has no markers."""
    reports = load(root / "bench" / "results")
    for report in reports:
        plot(report.results, root / "docs" / report.plot_name)
    documents = {root / "docs" / "benchmarks.md": details(reports), root / "README.md": summary(reports)}
    unmarked = [str(path.relative_to(root)) for path, text in documents.items() if not rewrite(path, text)]
    if unmarked:
        print(f"no {BEGIN} ... {END} in {', '.join(unmarked)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
