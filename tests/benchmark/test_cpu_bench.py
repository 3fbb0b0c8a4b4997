"""Tests of ``python -m bench.cpu`` at tiny sizes: correctness, noise detection, and reasons."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from bench import cpu, cpu_measure, cpu_report, quiet
from bench.cpu_candidates import CANDIDATES, build, names_for
from bench.cpu_cases import QUICK, SHAPES, CpuCase, cases
from bench.cpu_cases import quick as shrunk
from bench.cpu_measure import Row, run_case
from bench.quiet import Bursts, Sample
from llm_trm.benchmark.results import read
from llm_trm.benchmark.runner import Budget
from llm_trm.benchmark.runner import run_case as run_case_of_command
from llm_trm.benchmark.steps import make_inputs, make_state
from llm_trm.benchmark.workloads import Case
from tests.backend_double import alter
from trm_kernels import backends
from trm_kernels.backends import packed

CPU = torch.device("cpu")
TINY = Case("forward", 32, 12, batch=3, heads=4, recursions=1)
FIXED, RAGGED = CpuCase(TINY), CpuCase(TINY, ragged=True)


class FakeModule:
    """The parts of the native module that bursts use.

    Returns ``rates`` and ``peaks`` in turn, and repeats the last one.
    """

    def __init__(self, *rates: float, peaks: Sequence[float] = (100.0,)) -> None:
        self.rates = list(rates)
        self.peaks = list(peaks)
        self.calls: list[tuple[float, int, str]] = []

    def instruction_sets(self) -> list[str]:
        return ["avx9", "avx2"]

    def default_instruction_set(self) -> str:
        return "avx2"

    def fma_peak(self, seconds: float, threads: int, name: str) -> float:
        return self._next(self.peaks, seconds, threads, name)

    def tile_rate(self, seconds: float, threads: int, name: str) -> float:
        return self._next(self.rates, seconds, threads, name)

    def _next(self, rates: list[float], seconds: float, threads: int, name: str) -> float:
        self.calls.append((seconds, threads, name))
        return rates.pop(0) if len(rates) > 1 else rates[0]


def machine(*threads: int, module: FakeModule | None = None) -> dict[int, Bursts]:
    """A machine on which every burst is quiet, unless ``module`` returns other rates."""
    native = cast("ModuleType", module or FakeModule(50.0))
    return {count: Bursts(count, native) for count in threads or (1,)}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _any_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow any spread, because calls of microseconds vary on any machine."""
    monkeypatch.setattr(cpu_measure, "MAX_SPREAD", math.inf)


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Tensor]], None]:
    """Replaces the native backend by a function (net, x, mask)."""

    def install(run: Callable[..., Tensor]) -> None:
        backend = backends.Backend("native", "", lambda: None, lambda *_: None, run)
        monkeypatch.setitem(backends.BACKENDS, "native", backend)

    return install


def reference_of(net: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    """The expected result of the native backend."""
    return cast("Tensor", net.forward_eager(x, mask))


def rows_of(work: CpuCase, *names: str, module: FakeModule | None = None) -> dict[str, dict[str, Any]]:
    """The rows of a run on one thread."""
    line = run_case(work, machine(module=module), names, 0.02)
    (part,) = line["measurements"]
    return {row["candidate"]: row for row in part["measured"]}


@pytest.mark.parametrize(("family", "weights"), [("seed", 12 * 32**2), ("scratch", 16 * 32**2)])
def test_operations_count_valid_rows(family: str, weights: int) -> None:
    work = replace(RAGGED, case=replace(TINY, family=family))
    rows, squares = sum(work.lengths()), sum(length**2 for length in work.lengths())
    call = 2 * (2 * rows * weights + 4 * squares * 32)
    assert work.flops == 7 * call
    assert replace(work, case=replace(work.case, mode="train")).flops == 21 * call


@pytest.mark.parametrize("family", ["seed", "scratch", "paper"])
def test_operations_of_fixed_lengths_are_the_cases_own(family: str) -> None:
    case = replace(TINY, family=family)
    assert CpuCase(case).flops == case.flops > CpuCase(case, ragged=True).flops


def test_lengths_are_between_a_third_and_the_maximum() -> None:
    work = CpuCase(replace(TINY, latents=24, batch=200), ragged=True)
    lengths = work.lengths()
    assert lengths[0] == max(lengths) == 24
    assert min(lengths) == 8
    mask = work.mask()
    assert mask is not None
    assert mask.sum(dim=1).tolist() == lengths
    assert work.padding == pytest.approx(24 / (sum(lengths) / 200))
    assert work.lengths() == lengths != replace(work, seed=1).lengths()
    assert FIXED.mask() is None
    assert FIXED.lengths() == [12] * 3


def test_names_of_cases_are_distinct() -> None:
    every = cases(tuple(SHAPES), ("forward", "train"), (False, True), 0)
    assert len({work.name for work in every}) == len(every)
    assert not any(work.ragged and work.case.batch == 1 for work in every)
    for work in (shrunk(work) for work in every):
        assert work.case.hidden_size <= 32
        assert work.flops < 1e9
        work.case.config()
    assert set(QUICK) <= set(SHAPES)


def test_samples_with_a_slow_burst_are_dropped_and_counted() -> None:
    bursts = machine(module=FakeModule(50, 50, 44, 50, 50, 44, 46, 46, 60, 50))[1]
    timer = bursts.timer(lambda call, first, count: 1.0)
    samples = [timer(lambda _: None, 0, 1) for _ in range(4)]
    assert samples == [1.0] * 4
    kept = bursts.quiet(cast("list[Sample]", samples))
    assert [sample.burst for sample in kept] == [50.0, 46.0]
    bursts.burst()  # a faster burst later makes earlier samples count as noisy
    assert bursts.reached() == 60.0
    assert bursts.quiet(kept) == []
    bursts.begin()
    bursts.burst()  # but another case has its own bursts
    assert bursts.reached() == 50.0


def test_one_burst_in_twenty_may_be_a_rising_clock() -> None:
    bursts = machine(module=FakeModule(*[50.0] * 19, 90.0, 90.0))[1]
    assert bursts.reached() == 0.0
    for _ in range(20):
        bursts.burst()
    assert bursts.reached() == 50.0
    bursts.burst()
    assert bursts.reached() == 90.0


def test_peak_is_measured_on_the_best_instruction_set() -> None:
    # 95 of 100 bursts are no faster; the others ran with a rising clock.
    first, second = [40.0] * 50 + [50.0] * 45 + [90.0] * 5, [45.0] * 100
    bursts = machine(2, module=(module := FakeModule(20.0, peaks=first + second + [60.0])))[2]
    assert bursts.measure_peak() == 50.0
    assert {(threads, name) for _, threads, name in module.calls} == {(2, "avx9")}
    assert bursts.reached() == 0.0  # they do not count as bursts of the micro-kernel
    assert bursts.measure_peak() == 50.0
    assert bursts.measure_peak() == 60.0


def test_bursts_without_the_module_have_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    bursts = Bursts(1, None)
    assert bursts.kind == "mm"
    assert bursts.burst() > 0.1
    assert bursts.measure_peak() is None

    def missing(name: str) -> ModuleType:
        raise ImportError(name)

    monkeypatch.setattr(quiet.importlib, "import_module", missing)
    assert quiet.native_module() is None
    assert quiet.record(None) == {"peak": None, "native": None}


def test_correct_native_is_timed(native: Any) -> None:
    native(reference_of)
    rows = rows_of(FIXED, "eager", "native", module=FakeModule(50.0, peaks=[80.0]))
    assert [row["status"] for row in rows.values()] == ["ok", "ok"]
    ours = rows["native"]
    assert ours["p20_ms"] <= ours["median_ms"] <= ours["p80_ms"]
    assert ours["gflops"] == pytest.approx(FIXED.flops / ours["median_ms"] * 1e-6)
    assert ours["share"] == pytest.approx(ours["gflops"] / 80.0)
    assert ours["ratio"] == {"eager": pytest.approx(rows["eager"]["median_ms"] / ours["median_ms"])}
    assert ours["samples"] >= 3
    assert ours["dropped"] == 0


def test_missing_native_has_a_row_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = backends.BACKENDS["native"]
    monkeypatch.setitem(backends.BACKENDS, "native", replace(backend, unavailable=lambda: "it was not built"))
    row = rows_of(FIXED, "eager", "native")["native"]
    assert (row["status"], row["reason"], row["median_ms"]) == ("not run", "it was not built", None)


@pytest.mark.parametrize("refuses", ["the call", "the recursion"])
def test_reason_for_not_running_is_in_the_row(refuses: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor | None] = []

    def no_masks(net: object, x: Tensor, mask: Tensor | None) -> str | None:
        seen.append(mask)
        return "no masks" if mask is not None and refuses == "the call" else None

    backend = backends.Backend(
        "native",
        "",
        lambda: None,
        no_masks,
        reference_of,
        backends.FusedRecursion(lambda *_: "no masks", lambda *_, **__: None),  # type: ignore[arg-type, return-value]
    )
    monkeypatch.setitem(backends.BACKENDS, "native", backend)
    row = rows_of(RAGGED, "native")["native"]
    assert (row["status"], row["reason"]) == ("not run", "no masks")
    assert all(mask is not None and mask.shape == (3, 12) for mask in seen)


def twice_the_gradient(net: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    return reference_of(net, 2 * x - x.detach(), mask)


def one_percent_more(net: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    return reference_of(net, x, mask) * 1.01


def not_a_number(net: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    return reference_of(net, x, mask) * float("nan")


def ones_at_padding(net: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    assert mask is not None
    return reference_of(net, x, mask).masked_fill(~mask[..., None], 1.0)


@pytest.mark.parametrize(
    ("run", "mode", "wrong"),
    [
        (one_percent_more, "forward", ["output"]),
        (not_a_number, "forward", ["output"]),
        (ones_at_padding, "forward", ["output"]),
        (twice_the_gradient, "train", ["gradients"]),
        (twice_the_gradient, "forward", []),
    ],
)
def test_wrong_candidates_have_no_speed(
    run: Callable[..., Tensor], mode: Any, wrong: list[str], native: Any
) -> None:
    native(run)
    row = rows_of(replace(RAGGED, case=replace(TINY, mode=mode)), "eager", "native")["native"]
    assert row["status"] == ("wrong" if wrong else "ok")
    for pool in ("output", "gradients"):
        assert ((row["reason"] or "").count(f"{pool}: error") == 1) == (pool in wrong)
    assert (row["median_ms"] is None) == (row["ratio"] == {}) == bool(wrong)


@pytest.mark.parametrize("mode", ["forward", "train"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_packed_packs(mode: Any, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packings = 0
    run_recursion = packed.run_recursion

    def counted(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        nonlocal packings
        packings += 1
        return run_recursion(*args, **options)

    alter(monkeypatch, "eager", "packed", run=counted)
    work = replace(RAGGED, case=replace(TINY, mode=mode, dtype=dtype))
    for name, expected in (("original", 0), ("eager", 0), ("packed", 1)):
        packings = 0
        torch.manual_seed(0)
        inputs, mask = make_inputs(work.case, CPU, 0), work.mask()
        step = build(name, work, make_state(work.case, CPU), inputs, mask)
        assert not isinstance(step, str)
        step(0)
        assert packings == expected
    rows = rows_of(work, "original", "eager", "packed")
    assert {row["status"] for row in rows.values()} == {"ok"}, rows


def test_rows_without_padding_have_no_packed_candidate() -> None:
    work = CpuCase(replace(TINY, batch=1), ragged=True)  # one sample, padded to its own length
    row = rows_of(work, "packed")["packed"]
    assert (row["status"], row["reason"]) == ("not run", "there is no padding")


def test_tables_have_matching_candidates() -> None:
    train = replace(FIXED, case=replace(TINY, mode="train"))
    assert names_for(FIXED) == ("original", "eager", "compile", "freezing", "native")
    assert names_for(train) == ("original", "eager", "compile", "native")
    assert names_for(RAGGED) == tuple(CANDIDATES)
    assert "original" not in names_for(replace(FIXED, case=replace(TINY, family="paper")))


def test_too_few_quiet_samples_give_no_ratio() -> None:
    # One fast burst in nine is never both before and after a sample.
    bursts = ([20.0] * 8 + [50.0]) * 500
    row = rows_of(FIXED, "original", "eager", module=FakeModule(*bursts))["original"]
    assert row["status"] == "noisy"
    assert row["samples"] < 3
    assert row["dropped"] >= 3
    assert row["ratio"] == {}
    assert row["median_ms"] is row["gflops"] is row["share"] is None
    assert f"{row['samples']} of {row['samples'] + row['dropped']} samples" in row["reason"]


def test_quiet_samples_with_large_spread_give_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_measure, "MAX_SPREAD", 1.5)
    bursts = machine()[1]
    bursts.burst()
    for slowest, status in ((1.4, "ok"), (1.6, "noisy")):
        row = Row("eager")
        samples = [Sample(seconds, bursts.reached()) for seconds in (1.0, 1.0, slowest, slowest)]
        cpu_measure._fill(row, samples, FIXED, bursts)
        assert (row.status, row.fastest_ms) == (status, 1e3)
        assert (row.median_ms is None) == (status == "noisy")


def test_rounds_continue_until_enough_samples_are_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_measure, "_MAX_ATTEMPTS", 1)
    noise = [50.0] + [20.0] * 6
    assert rows_of(FIXED, "eager", module=FakeModule(*noise, 50.0))["eager"]["dropped"] > 0
    slow = replace(FIXED, case=replace(TINY, mode="train"))
    assert run_rounds(slow, noise)["status"] == "noisy"
    monkeypatch.setattr(cpu_measure, "_MAX_ATTEMPTS", 3)
    row = run_rounds(slow, noise)
    assert row["status"] == "ok"
    assert row["samples"] >= 3


def run_rounds(work: CpuCase, noise: list[float]) -> dict[str, Any]:
    """Eager's row when there is only time for the minimum number of rounds."""
    line = run_case(work, machine(module=FakeModule(*noise, 50.0)), ("eager",), 1e-9)
    return cast("dict[str, Any]", line["measurements"][0]["measured"][0])


def test_failure_affects_only_its_candidate(native: Any) -> None:
    def broken(net: Any, x: Tensor, mask: Tensor | None) -> Tensor:
        raise RuntimeError("out of luck\nat line 3")

    native(broken)
    rows = rows_of(FIXED, "eager", "native")
    assert rows["eager"]["status"] == "ok"
    assert (rows["native"]["status"], rows["native"]["reason"]) == ("failed", "RuntimeError: out of luck")


def test_scaling_is_from_one_thread() -> None:
    line = run_case(FIXED, machine(1, 2), ("eager",), 0.02)
    single, double = (part["measured"][0] for part in line["measurements"])
    assert [part["threads"] for part in line["measurements"]] == [1, 2]
    assert torch.get_num_threads() == 2
    assert single["scaling"] is None
    assert double["scaling"] == pytest.approx(single["median_ms"] / double["median_ms"])
    rows = {2: [Row("eager", median_ms=1.0)], 4: [Row("eager", median_ms=0.5)]}
    cpu_measure._add_scaling(rows)
    assert rows[4][0].scaling is None  # nothing ran on one thread


@pytest.mark.slow
def test_freezing_prepacks_the_weights() -> None:
    torch.compiler.reset()
    counters.clear()
    assert rows_of(FIXED, "freezing")["freezing"]["status"] == "ok"
    assert counters["inductor"]["mkldnn_linear_weight_pack_matcher_count"] == 8
    assert counters["stats"]["unique_graphs"] == 1


def test_command_appends_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quiet, "native_module", lambda: FakeModule(50.0))
    out = tmp_path / "native.jsonl"
    arguments = "--quick --cases d256-b8 --modes forward --lengths ragged --threads 1 --commit abc"
    cpu.main([*arguments.split(), "--candidates", "eager", "packed", "native", "--out", str(out)])
    (line,) = read(out)
    assert line["commit"] == "abc"
    assert line["machine"]["threads"] == [1]
    assert line["machine"]["instruction_sets"] == {"peak": "avx9", "native": "avx2"}
    assert "rows" not in line  # otherwise bench.report would read it as a case of llm-trm bench
    assert line["lengths"] == CpuCase(Case(**line["case"]), ragged=True).lengths()
    measured = line["measurements"][0]["measured"]
    assert [row["candidate"] for row in measured] == ["eager", "packed", "native"]
    printed = capsys.readouterr().out
    assert cpu_report.describe(line) in printed
    assert backends.BACKENDS["native"].unavailable() is None or "native: not run: " in printed


QUICKEST = ("--quick", "--cases", "d256", "--modes", "forward", "--threads", "1")


def test_wrong_result_ends_the_command_with_an_error(native: Any, capsys: pytest.CaptureFixture[str]) -> None:
    native(one_percent_more)
    with pytest.raises(SystemExit) as stopped:
        cpu.main([*QUICKEST, "--candidates", "eager", "native"])
    assert stopped.value.code == 1
    assert "| native | WRONG |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--cases d7", "invalid choice"),
        ("--threads 0", "at least 1"),
        ("--seconds 0", "positive"),
        ("--cases d256 --lengths ragged", "no ragged lengths"),
        ("--out /no/such/folder/x.jsonl", "does not exist"),
    ],
)
def test_nonsense_is_refused(arguments: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cpu.main(arguments.split())
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def made_up(work: CpuCase, threads: int, native_ms: float | None, *, day: int = 1) -> dict[str, Any]:
    """A line of a results file."""
    eager = Row("eager", "ok", None, 3.0, 2.9, 3.1, 9, 1, 2.8, 40.0, 0.4, {}, None, {"output": 1e-7})
    other = Row("native", "wrong", "output: error 1", errors={"output": None})
    if native_ms is not None:
        other = replace(
            eager, candidate="native", median_ms=native_ms, ratio={"eager": 3.0 / native_ms}, scaling=1.9
        )
    part = {
        "threads": threads,
        "fma_peak_gflops": 100.0,
        "burst_gflops": 99.0,
        "burst": "tile",
        "measured": [vars(eager), vars(other)],
    }
    return {
        "time": f"2026-01-0{day}T00:00:00+00:00",
        "commit": f"commit-of-{day}",
        "versions": {"torch": "2.13"},
        "machine": {"instruction_sets": {"peak": "avx9", "native": "avx2"}},
        "name": work.name,
        "case": work.case.to_json(),
        "ragged": work.ragged,
        "padding": work.padding,
        "gflop": 1.0,
        "device": "Abacus",
        "measurements": [part],
    }


def write(folder: Path, *lines: dict[str, Any]) -> Path:
    """A results folder."""
    (folder / "native.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_report_shows_the_latest_of_every_case_and_number_of_threads(tmp_path: Path) -> None:
    assert cpu_report.text(tmp_path) == "Not measured yet."
    results = write(
        tmp_path,
        made_up(FIXED, 2, 2.0, day=2),
        made_up(FIXED, 2, 1.0, day=1),
        made_up(FIXED, 1, 2.5, day=1),
        made_up(RAGGED, 2, None, day=1),
    )
    text = cpu_report.text(results)
    summary = text.partition("All results:")[0]
    assert "| d 32, L 12, B 3 | 2 | 3.00 | 1.50x | 40.0 | 40% | 1.90x |" in summary
    assert "| d 32, L 12, B 3 | 1 | 3.00 | 1.20x | 40.0 | 40% | 1.90x |" in summary
    assert (
        f"ragged ({RAGGED.padding:.2f} padded rows per valid row) | 2 | 3.00 | WRONG | - | - | - |" in summary
    )
    assert "3.00x" not in text  # from the earlier run
    assert "commit-of-2" in text
    assert "FMA peak (avx9): 100 GF/s on 1 thread, 100 GF/s on 2 threads" in text
    assert "dropped 5 of 50 samples" in text
    assert "wrong: output: error 1" in text
    assert "Forward and backward" not in text
    assert len({line.count("|") for line in summary.splitlines() if line.startswith("|")}) == 1


def test_fastest_calls_are_in_brackets_if_too_few_are_quiet(tmp_path: Path) -> None:
    line = made_up(FIXED, 2, 2.0)
    for row in line["measurements"][0]["measured"]:
        row |= dict.fromkeys(("median_ms", "gflops", "share", "scaling")) | {"status": "noisy", "ratio": {}}
    line["measurements"][0]["measured"][1]["fastest_ms"] = 1.75
    summary, _, details = cpu_report.text(write(tmp_path, line)).partition("All results:")
    assert "| d 32, L 12, B 3 | 2 | noisy | (1.60x) | - | - | - |" in summary
    assert "| 2.80 | 1.00x |" in details
    assert "| 1.75 | 1.60x |" in details


def test_plot_is_deterministic(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    train = replace(FIXED, case=replace(TINY, mode="train"))
    write(tmp_path, made_up(FIXED, 2, 2.0), made_up(train, 2, 2.0), made_up(RAGGED, 2, None))
    ((name, (device, measured)),) = cpu_report.plots(tmp_path).items()
    assert name == "cpu-abacus.png"
    path = tmp_path / name
    cpu_report.plot(device, measured, path)
    first = path.read_bytes()
    cpu_report.plot(device, measured, path)
    assert first == path.read_bytes()
    cpu_report.plot(device, [], tmp_path / "nothing.png")
    assert (tmp_path / "nothing.png").exists()


@pytest.mark.parametrize("mode", ["forward", "train", "step"])
def test_bench_command_times_native_with_the_others(mode: Any, native: Any) -> None:
    native(reference_of)
    case = Case(mode, 32, 8, batch=2, heads=4)
    row = run_case_of_command(case, CPU, ("native",), Budget(600, 0.02)).rows[0]
    assert (row.status, row.reason) == ("ok", None)
    assert row.median_ms is not None


def test_bench_command_reports_why_native_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = backends.Backend("native", "", lambda: None, lambda *_: "odd width", reference_of)
    monkeypatch.setitem(backends.BACKENDS, "native", backend)
    case = Case("forward", 32, 8, heads=4)
    row = run_case_of_command(case, CPU, ("native",), Budget(600, 0.02)).rows[0]
    assert (row.status, row.reason) == ("not run", "odd width")
