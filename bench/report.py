"""Generates the docs' tables and plots from ``bench/results/*.jsonl``: ``python -m bench.report``.

Rewrites the text between ``<!-- bench:begin -->`` and ``<!-- bench:end -->`` in docs/benchmarks.md (all
tables), docs/training.md, docs/latent.md, docs/cpu.md, docs/puzzles.md (``bench/*_report.py``) and README.md
(one line per case), and the plots in docs/: for each device, bars and curves of time against batch size,
length and width. No number is written by hand.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import cpu_report, latent_report, puzzle_report, training_report, weights
from llm_trm.benchmark.plot import plot, plot_scaling
from llm_trm.benchmark.results import CaseResult, read
from llm_trm.benchmark.suites import Group
from llm_trm.benchmark.table import footnotes, markdown_table, number, title

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


@dataclass
class DeviceReport:
    """The latest result of every case and group on one device, with the metadata of its run."""

    device: str
    results: list[CaseResult]
    runs: list[dict[str, Any]]

    @property
    def is_gpu(self) -> bool:
        """Whether the results come from a CUDA or ROCm device."""
        return bool(self.runs[0]["machine"]["device_type"] == "cuda")

    def of(self, *groups: Group) -> list[CaseResult]:
        """The results of some groups."""
        return [result for result in self.results if result.group in groups]

    def plots(self) -> dict[str, tuple[Callable[[Sequence[CaseResult], Path], None], list[CaseResult]]]:
        """File name of each plot, the function that draws it, and its results."""
        slug = re.sub("[^a-z0-9]+", "-", self.device.lower()).strip("-")
        drawn: dict[str, tuple[Callable[[Sequence[CaseResult], Path], None], list[CaseResult]]] = {}
        if bars := self.of("main", "peers"):
            drawn[f"benchmarks-{slug}.png"] = plot, bars
        scaling = self.of("scaling")
        for dtype in sorted({result.case.dtype for result in scaling}):
            curves = [result for result in scaling if result.case.dtype == dtype]
            drawn[f"benchmarks-{slug}-scaling-{dtype}.png"] = plot_scaling, curves
        return drawn

    def provenance(self, *groups: Group) -> str:
        """Versions, commits and dates of the results of some groups, or of all."""
        found: dict[str, None] = {}
        for run in self._runs_of(groups):
            versions = run["versions"]
            found[
                f"torch {versions['torch']}, triton {versions['triton'] or '-'}, "
                f"commit {_commit(run)}, {run['time'][:10]}"
            ] = None
        return "; ".join(found)

    def commits(self, *groups: Group) -> str:
        """Commits of the results of some groups, or of all."""
        return ", ".join(dict.fromkeys(_commit(run) for run in self._runs_of(groups)))

    def _runs_of(self, groups: Sequence[Group]) -> list[dict[str, Any]]:
        pairs = zip(self.results, self.runs, strict=True)
        return [run for result, run in pairs if not groups or result.group in groups]


def _commit(run: Mapping[str, Any]) -> str:
    return str(run["commit"] or "unknown")[:13]


def load(folder: Path) -> list[DeviceReport]:
    """Read all results files of a folder. The latest line of each key and device counts."""
    latest: dict[str, dict[str, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in read(path):
            # A case that is measured again after tuning has few rows, and would hide the complete result.
            if "rows" not in line or line.get("tuned"):
                continue
            cases = latest.setdefault(line["device"], {})
            if line["name"] not in cases or cases[line["name"]]["time"] <= line["time"]:
                cases[line["name"]] = line
    return [
        DeviceReport(device, [CaseResult.from_json(line) for line in cases.values()], list(cases.values()))
        for device, cases in sorted(latest.items())
    ]


def details(reports: list[DeviceReport]) -> str:
    """All tables, with one section per device; for the scaling suite, one line per case."""
    parts = []
    for report in reports:
        parts += [f"## {report.device}", report.provenance() + "."]
        parts += [
            f"![{report.device}{', scaling' if draw is plot_scaling else ''}]({name})"
            for name, (draw, _) in report.plots().items()
        ]
        for result in report.of("main", "peers"):
            notes = "\n".join(f"- {note}" for note in footnotes(result))
            against = ", against peers" if result.group == "peers" else ""
            parts += [f"**{title(result)}{against}**", markdown_table(result), notes]
        if scaling := report.of("scaling"):
            parts += ["**Scaling, median ms of one latent recursion**", _medians(scaling)]
    return "\n\n".join(parts + _missing(reports, SECTIONS))


def _medians(results: Sequence[CaseResult]) -> str:
    """One line per case: the limit, and the median milliseconds of all timed candidates."""
    names = list(dict.fromkeys(row.backend for result in results for row in result.rows if row.median_ms))
    lines = [["ms", "limit", *names], ["---"] + ["---:"] * (len(names) + 1)]
    for result in results:
        medians = {row.backend: row.median_ms for row in result.rows if row.median_ms is not None}
        cells = [number(medians[name]) if name in medians else "-" for name in names]
        lines.append([result.case.name, number(result.floor_ms), *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def summary(reports: list[DeviceReport]) -> str:
    """One line per case, without peers and scaling."""
    parts = []
    for report in reports:
        source = f"Measured on {report.device} (commits {report.commits('main')})."
        parts += [_medians(report.of("main")), source]
    return "\n\n".join(parts + _missing(reports))


#: Sections that the docs report as not measured until a device has results for them.
SECTIONS: dict[str, Callable[[CaseResult], bool]] = {
    "Whole training steps": lambda result: result.case.mode == "step",
    "Other implementations": lambda result: result.group == "peers",
    "Scaling": lambda result: result.group == "scaling",
}


def _missing(
    reports: list[DeviceReport], sections: Mapping[str, Callable[[CaseResult], bool]] | None = None
) -> list[str]:
    lines = [] if any(report.is_gpu for report in reports) else ["On a GPU: not measured yet."]
    measured = [result for report in reports for result in report.results]
    return lines + [
        f"{section}: not measured yet."
        for section, belongs in (sections or {}).items()
        if not any(belongs(result) for result in measured)
    ]


def rewrite(path: Path, text: str) -> bool:
    """Replace the text between the markers of a file. Returns False if it has no markers."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        return False
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")
    return True


def main(root: Path = ROOT) -> None:
    """Generate everything. The exit code is 1 if a document has no markers."""
    reports = load(root / "bench" / "results")
    for report in reports:
        for name, (draw, results) in report.plots().items():
            draw(results, root / "docs" / name)
    for name, (device, measured) in cpu_report.plots(root / "bench" / "results").items():
        cpu_report.plot(device, measured, root / "docs" / name)
    puzzle_report.plot(root / "bench" / "results", root / "docs" / puzzle_report.PLOT)
    documents = {
        root / "docs" / "benchmarks.md": details(reports),
        root / "docs" / "training.md": training_report.text(root / "bench" / "results"),
        root / "docs" / "cpu.md": "\n\n".join(
            filter(None, (report.text(root / "bench" / "results") for report in (cpu_report, weights)))
        ),
        root / "docs" / "latent.md": latent_report.text(root / "bench" / "results"),
        root / "docs" / "puzzles.md": puzzle_report.text(root / "bench" / "results"),
        root / "README.md": summary(reports),
    }
    unmarked = [str(path.relative_to(root)) for path, text in documents.items() if not rewrite(path, text)]
    if unmarked:
        print(f"no {BEGIN} ... {END} in {', '.join(unmarked)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
