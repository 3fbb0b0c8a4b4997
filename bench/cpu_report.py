"""Generates docs/cpu.md and its plots from ``bench/results/native.jsonl``, which ``bench/cpu.py`` writes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cpu_candidates import CANDIDATES
from llm_trm.benchmark.plot import colour, figure, show_empty
from llm_trm.benchmark.results import read
from llm_trm.benchmark.table import number
from llm_trm.benchmark.workloads import Case

RESULTS = "native.jsonl"

#: The baseline of the ratios, and the candidate whose rate the summary shows.
_BASELINE, _OURS = "eager", "native"
_MODES = {"forward": "Forward", "train": "Forward and backward"}


@dataclass(frozen=True)
class Measurement:
    """All rows of one case on one number of threads."""

    line: Mapping[str, Any]
    part: Mapping[str, Any]

    @property
    def threads(self) -> int:
        """Number of threads of all candidates."""
        return int(self.part["threads"])

    @property
    def mode(self) -> str:
        """``forward`` or ``train``."""
        return str(self.line["case"]["mode"])

    @property
    def rows(self) -> Sequence[Mapping[str, Any]]:
        """One row per candidate."""
        rows: Sequence[Mapping[str, Any]] = self.part["measured"]
        return rows

    def row(self, candidate: str) -> Mapping[str, Any] | None:
        """The row of a candidate, if it has one."""
        return next((row for row in self.rows if row["candidate"] == candidate), None)

    @property
    def shape(self) -> str:
        """The case without its mode."""
        case = Case(**self.line["case"])
        words = [f"d {case.hidden_size}", f"L {case.latents}", f"B {case.batch}"]
        words += [case.family] * (case.family != "seed")
        words += ["bf16"] * (case.dtype == "bfloat16")
        if self.line["ragged"]:
            words.append(f"ragged ({self.line['padding']:.2f} padded rows per valid row)")
        return ", ".join(words)


def load(results: Path) -> dict[str, list[Measurement]]:
    """Measurements by device. The latest of each case and number of threads counts."""
    latest: dict[str, dict[tuple[str, int], Measurement]] = {}
    lines = [line for line in read(results / RESULTS) if "measurements" in line]
    for line in sorted(lines, key=lambda line: str(line["time"])):
        for part in line["measurements"]:
            latest.setdefault(line["device"], {})[line["name"], part["threads"]] = Measurement(line, part)
    return {device: list(found.values()) for device, found in sorted(latest.items())}


def plots(results: Path) -> dict[str, tuple[str, list[Measurement]]]:
    """File name of each plot, its device, and its measurements."""
    return {
        f"cpu-{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.png": (device, measured)
        for device, measured in load(results).items()
    }


def text(results: Path) -> str:
    """One section per device, as Markdown: provenance, plot, a summary per mode, and all results."""
    parts = []
    for name, (device, measured) in plots(results).items():
        parts += [f"## {device}", _provenance(measured), f"![{device}]({name})"]
        for mode, title in _MODES.items():
            if chosen := [found for found in measured if found.mode == mode]:
                parts += [f"### {title}", _summary(chosen), "All results:", _details(chosen)]
                parts.append("\n".join(dict.fromkeys(_notes(chosen))))
    return "\n\n".join(part for part in parts if part) or "Not measured yet."


def describe(line: Mapping[str, Any]) -> str:
    """A line of a results file as a table with its notes, for the terminal."""
    measured = [Measurement(line, part) for part in line["measurements"]]
    notes = "\n".join(dict.fromkeys(_notes(measured)))
    return f"{line['name']}: {number(line['gflop'])} GFLOP per call\n{_details(measured)}\n{notes}".rstrip()


def _provenance(measured: Sequence[Measurement]) -> str:
    """Versions, commits, dates, peaks, and the number of dropped samples."""
    lines = [found.line for found in measured]
    runs = dict.fromkeys(
        f"torch {line['versions']['torch']}, commit {(line['commit'] or 'unknown')[:13]}, {line['time'][:10]}"
        for line in lines
    )
    peaks: dict[int, float] = {}
    for found in measured:
        if (peak := found.part["fma_peak_gflops"]) is not None:
            peaks[found.threads] = max(peak, peaks.get(found.threads, 0.0))
    rows = [row for found in measured for row in found.rows]
    dropped = sum(row["dropped"] for row in rows)
    taken = dropped + sum(row["samples"] for row in rows)
    sets = next((line["machine"]["instruction_sets"]["peak"] for line in lines[::-1]), None)
    measured_peaks = ", ".join(
        f"{number(peak)} GF/s on {_count(threads)}" for threads, peak in sorted(peaks.items())
    )
    return " ".join(
        (
            "; ".join(runs) + ".",
            f"FMA peak{f' ({sets})' if sets else ''}: {measured_peaks or 'not measured'}.",
            f"The quiet check dropped {dropped} of {taken} samples.",
        )
    )


def _count(threads: int) -> str:
    return f"{threads} thread{'s' * (threads > 1)}"


def _speed(row: Mapping[str, Any] | None, eager: Mapping[str, Any] | None) -> str:
    """Ratio to eager, or in brackets the ratio of the fastest calls, or the status if there is none."""
    if row is None:
        return "-"
    if row["status"] not in ("ok", "noisy"):
        return "WRONG" if row["status"] == "wrong" else str(row["status"])
    ratio = row["ratio"].get(_BASELINE)
    if ratio is not None:
        return f"{ratio:.2f}x"
    fastest = _fastest_ratio(row, eager)
    return fastest if fastest == "-" else f"({fastest})"


def _fastest_ratio(row: Mapping[str, Any], eager: Mapping[str, Any] | None) -> str:
    mine, theirs = row.get("fastest_ms"), eager.get("fastest_ms") if eager else None
    return f"{theirs / mine:.2f}x" if mine and theirs else "-"


def _share(row: Mapping[str, Any] | None) -> str:
    return "-" if row is None or row["share"] is None else f"{row['share']:.0%}"


def _summary(measured: Sequence[Measurement]) -> str:
    """One line per case: milliseconds of eager, the ratio of every other candidate, and the native rate."""
    names = {row["candidate"] for found in measured for row in found.rows}
    others = [name for name in CANDIDATES if name in names and name != _BASELINE]
    head = [
        "case",
        "threads",
        f"{_BASELINE}, ms",
        *others,
        f"{_OURS}, GF/s",
        "of FMA peak",
        "scaling from 1 thread",
    ]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for found in measured:
        eager, ours = found.row(_BASELINE), found.row(_OURS)
        cells = [found.shape, str(found.threads)]
        cells.append(_milliseconds(eager))
        cells += [_speed(found.row(name), eager) for name in others]
        cells += [number(ours["gflops"]) if ours else "-", _share(ours), _scaling(ours)]
        lines.append(cells)
    return _table(lines)


def _milliseconds(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    if row["status"] != "ok":
        return "WRONG" if row["status"] == "wrong" else str(row["status"])
    return number(row["median_ms"])


def _scaling(row: Mapping[str, Any] | None) -> str:
    return "-" if row is None or row["scaling"] is None else f"{row['scaling']:.2f}x"


_HEAD = ("threads", "candidate", "ms", "p20", "p80", "GF/s", "of FMA peak")
_TAIL = (
    "vs eager",
    "vs original",
    "scaling",
    "samples",
    "dropped",
    "fastest, ms",
    "vs eager's",
    "error (y / gradients)",
)


def _details(measured: Sequence[Measurement]) -> str:
    """One line per candidate."""
    several = len({found.shape for found in measured}) > 1
    head = ["case"] * several + [*_HEAD, *_TAIL]
    lines = [head, ["---"] * (2 + several) + ["---:"] * (len(head) - 2 - several)]
    for found in measured:
        for row in found.rows:
            cells = [found.shape] * several + [str(found.threads), row["candidate"], _milliseconds(row)]
            cells += [number(row[key]) for key in ("p20_ms", "p80_ms", "gflops")]
            cells.append(_share(row))
            for baseline in (_BASELINE, "original"):
                ratio = row["ratio"].get(baseline)
                one = "1" if row["candidate"] == baseline and row["status"] == "ok" else "-"
                cells.append(one if ratio is None else f"{ratio:.2f}x")
            cells += [_scaling(row), str(row["samples"]), str(row["dropped"])]
            cells += [number(row.get("fastest_ms")), _fastest_ratio(row, found.row(_BASELINE)), _errors(row)]
            lines.append(cells)
    return _table(lines)


def _errors(row: Mapping[str, Any]) -> str:
    found = row["errors"].values()
    return " / ".join("NaN" if error is None else f"{error:.1e}" for error in found) or "-"


def _notes(measured: Sequence[Measurement]) -> Iterator[str]:
    """Yield the reasons for missing results."""
    for found in measured:
        for row in found.rows:
            if row["reason"] is not None:
                # A candidate that cannot run at all is reported once, without a case.
                where = "" if row["status"] == "not run" else f" ({found.shape}, {_count(found.threads)})"
                yield f"- {row['candidate']}{where}: {row['status']}: {row['reason']}"


def _table(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot(device: str, measured: Sequence[Measurement], path: Path) -> None:
    """Plot every candidate's speed relative to eager at each case's most threads, one panel per mode."""
    most: dict[str, Measurement] = {}
    for found in measured:
        name = found.line["name"]
        if name not in most or most[name].threads < found.threads:
            most[name] = found
    panels = [[found for found in most.values() if found.mode == mode] for mode in _MODES]
    tallest = max((sum(len(_ratios(found)) for found in panel) for panel in panels), default=0)
    size = (13, 1.2 + 0.18 * tallest + 0.2 * max(map(len, panels)))
    with figure(path, 1, len(_MODES), figsize=size, squeeze=False) as axes:
        for axis, title, panel in zip(axes[0], _MODES.values(), panels, strict=True):
            _draw(axis, panel)
            axis.set_title(f"{title}, {device}", fontsize=9, loc="left")


def _ratios(found: Measurement) -> dict[str, float]:
    return {row["candidate"]: row["ratio"][_BASELINE] for row in found.rows if _BASELINE in row["ratio"]}


def _draw(axis: Any, panel: Sequence[Measurement]) -> None:
    drawn = [(found, ratios) for found in panel if (ratios := _ratios(found))]
    if not drawn:
        show_empty(axis)
        return
    position, ticks, labels = 0.0, [], []
    for found, ratios in drawn:
        first = position
        for name, ratio in ratios.items():
            axis.barh(position, ratio, height=0.9, color=colour(name), label=name)
            axis.text(ratio, position, f" {ratio:.2f}x", va="center", fontsize=6)
            position += 1.0
        ticks.append((first + position - 1.0) / 2)
        labels.append(f"{found.shape.partition(' (')[0]}, {found.threads}T")
        position += 0.8
    axis.axvline(1.0, color="black", linestyle=":", linewidth=1)
    axis.set_yticks(ticks, labels, fontsize=7)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set_xlabel("speed against eager", fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    handles, names = axis.get_legend_handles_labels()
    unique = dict(zip(names, handles, strict=True))
    # Below the axis, so that it does not cover any bar.
    axis.legend(
        unique.values(),
        unique.keys(),
        fontsize=7,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.05),
        ncols=len(unique),
    )
