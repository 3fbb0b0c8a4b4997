"""Tests of tables, results files, and the documents generated from them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import bench.latent
import bench.latent_report
import bench.report
from llm_trm.benchmark.environment import run_record
from llm_trm.benchmark.plot import plot_scaling
from llm_trm.benchmark.results import CaseResult, Row, append, read
from llm_trm.benchmark.suites import suite
from llm_trm.benchmark.table import footnotes, markdown_table
from llm_trm.errors import InputError
from tests.benchmark.sample import sample_result

CPU = torch.device("cpu")


def test_ratios_use_medians() -> None:
    original, eager, wrong, _ = sample_result().rows
    assert original.speedup == {"eager": 0.5}
    assert eager.speedup == {"original": 2.0}
    assert wrong.speedup == {}


def test_table_withholds_the_speed_of_a_wrong_result() -> None:
    lines = markdown_table(sample_result()).splitlines()
    cells = {line.split(" | ")[0].strip("| "): line for line in lines}
    assert "WRONG" in cells["native"]
    assert "NaN" in cells["native"]
    assert "2.00x" in cells["eager"]
    assert "not run" in cells["triton"]
    assert len({line.count("|") for line in lines}) == 1


def test_results_round_trip_through_a_truncated_file(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    result = sample_result()
    append(file, {"commit": "abc"} | result.to_json())
    with file.open("a") as cut:
        cut.write('{"commit": "abc", "rows": [')
    append(file, {"commit": "def"} | result.to_json())
    lines = list(read(file))
    assert [line["commit"] for line in lines] == ["abc", "def"]
    assert CaseResult.from_json(lines[1]) == result


def test_run_record_names_the_given_commit() -> None:
    record = run_record(CPU, "0123abc")
    assert record["commit"] == "0123abc"
    assert record["versions"]["torch"] == torch.__version__
    assert json.dumps(record)


def test_report_draws_the_latest_results_between_the_markers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "docs").mkdir()
    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    names = ("training.md", "latent.md", "cpu.md", "puzzles.md")
    training, latent, cpu, puzzles = others = [tmp_path / "docs" / name for name in names]
    for document in (tmp_path / "README.md", tmp_path / "docs" / "benchmarks.md", *others):
        document.write_text(f"before\n{bench.report.BEGIN}\nold\n{bench.report.END}\nafter\n")
    for day, median in (("2026-01-02", 2.0), ("2026-01-01", 7.0)):
        result = sample_result()
        result.rows[1].median_ms = median
        record = run_record(CPU, f"commit-of-{day}") | {"time": f"{day}T00:00:00+00:00"}
        append(results / "cpu.jsonl", record | result.to_json())
    bench.report.main(tmp_path)
    for document in (tmp_path / "README.md", tmp_path / "docs" / "benchmarks.md"):
        text = document.read_text()
        assert text.startswith("before\n")
        assert text.endswith("\nafter\n")
        assert "old" not in text
        assert "commit-of-202" in text
        assert "On a GPU: not measured yet." in text
    assert training.read_text().count("Not measured yet.") == 2
    assert latent.read_text().count("Not measured yet.") == 1
    assert cpu.read_text().count("Not measured yet.") == 1
    assert puzzles.read_text().count("Not measured yet.") == 2
    assert "2.00" in text
    assert "7.00" not in text
    assert (tmp_path / "docs" / "benchmarks-abacus.png").exists()


def test_row_of_another_function_is_marked() -> None:
    result = sample_result()
    result.rows.append(
        Row("mixer", "ok", None, 1.0, 0.9, 1.1, 9, 1.0, differs="no attention", flops=2 * 10**9)
    )
    line = next(line for line in markdown_table(result).splitlines() if line.startswith("| mixer"))
    assert "other function" in line
    (note,) = (note for note in footnotes(result) if note.startswith("mixer"))
    for words in ("a different function", "no attention", "2.00 GFLOP per call", "the others"):
        assert words in note


def test_row_without_tolerance_rule_gives_the_reason() -> None:
    result = sample_result()
    result.rows.append(Row("fp8", "ok", None, 1.0, coarser="e4m3 operands", errors={"output": 0.03}))
    assert "fp8: not held to the tolerance rule: e4m3 operands" in footnotes(result)
    assert "3.0e-02" in markdown_table(result)


def test_results_written_before_there_were_groups_are_read() -> None:
    line = sample_result().to_json()
    del line["group"]
    for row in line["rows"]:
        for name in ("differs", "flops", "coarser"):
            del row[name]
    assert CaseResult.from_json(line) == sample_result()


def test_damaged_lines_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "cpu.jsonl"
    append(path, sample_result().to_json())
    deep, numbers = "[" * 200_000, ('{"rows": NaN}', '{"rows": 1e400}', "5", "null", "[]")
    path.write_text("\n".join([path.read_text(), deep, "9" * 5000, '{"rows": [', *numbers]))
    assert [CaseResult.from_json(line) for line in read(path)] == [sample_result()]


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line.pop("floor_ms"),
        lambda line: line.update(case={"mode": "x"}),
        lambda line: line.update(case=[]),
        lambda line: line.update(rows=[[]]),
        lambda line: line.update(rows=5),
        lambda line: line["rows"][0].update(colour="red"),
    ],
)
def test_a_line_that_is_no_result_is_named(damage: Any) -> None:
    line = sample_result().to_json()
    damage(line)
    with pytest.raises(InputError, match=re.escape(f"a result of {line['name']!r} has no valid case")):
        CaseResult.from_json(line)


def test_results_in_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Is a directory"):
        list(read(tmp_path))


def test_one_case_of_two_groups_is_two_results(tmp_path: Path) -> None:
    record = run_record(CPU, "abc")
    append(tmp_path / "cpu.jsonl", record | sample_result().to_json())
    append(tmp_path / "cpu.jsonl", record | replace(sample_result(), group="peers").to_json())
    (report,) = bench.report.load(tmp_path)
    assert [result.group for result in report.results] == ["main", "peers"]
    text = bench.report.details([report])
    assert "against peers" in text
    assert "Scaling: not measured yet." in text
    assert "Whole training steps: not measured yet." in text
    assert "Other implementations" not in text
    assert "peers" not in bench.report.summary([report])


def test_scaling_results_are_curves_and_one_table(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = [
        replace(sample_result(), case=case, group="scaling") for case in suite("scaling", "cuda", "bfloat16")
    ]
    for result in results:
        append(tmp_path / "gpu.jsonl", run_record(CPU, "abc") | result.to_json())
    (report,) = bench.report.load(tmp_path)
    assert list(report.plots()) == ["benchmarks-abacus-scaling-bfloat16.png"]
    text = bench.report.details([report])
    assert text.count("| seed forward") == len(results)
    plot_scaling(results, tmp_path / "curves.png")
    first = (tmp_path / "curves.png").read_bytes()
    plot_scaling(results, tmp_path / "curves.png")
    assert first == (tmp_path / "curves.png").read_bytes()
    plot_scaling([], tmp_path / "nothing.png")
    assert (tmp_path / "nothing.png").exists()


def test_results_of_an_arithmetic_world_run(tmp_path: Path) -> None:
    shares = {"no-think": 0.25, "think": 1.0, "latent": 0.85}

    def modes(scale: float) -> dict[str, dict[str, object]]:
        return {
            mode: {
                "accuracy": scale * share,
                "interval": [scale * share - 0.02, scale * share],
                "problems": 40,
                "tokens": 3.0,
                "seconds": 0.004,
                "steps": 1.5,
            }
            for mode, share in shares.items()
        }

    for file, scale in (("lora.json", 1.0), ("phase3.json", 0.5)):
        found = run_record(CPU) | {
            "modes": modes(scale),
            "groups": {"5": modes(scale)},
            "ratios": {"gap_closed": 0.8, "tokens": 0.2, "seconds": 0.3},
            "batch_seconds": {"think": [1.0]},
            "seed": 0,
        }
        (tmp_path / file).write_text(json.dumps(found))
    bench.latent.main([str(tmp_path), "--seed", "7", "--out", str(tmp_path / "latent.jsonl")])
    lora = tmp_path / "run"
    (lora / "checkpoint-90").mkdir(parents=True)
    (lora / "checkpoint-100").mkdir()
    (lora / "lora.json").write_text('{"device": "cpu", "seed": 3, "eval_samples": 50}')
    evaluations = [{"step": 90, "eval_loss": 1.0, "eval_answer_accuracy": 0.5}, {"step": 95, "loss": 1.0}]
    (lora / "checkpoint-100" / "trainer_state.json").write_text(json.dumps({"log_history": evaluations}))
    bench.latent.main([str(lora), "--learning", "nothing", "--out", str(tmp_path / "latent_learning.jsonl")])
    text = bench.latent_report.text(tmp_path)
    assert "| starts from | seed | after 90 updates |" in text and "| nothing | 3 | 50.0% |" in text
    assert "| 7 | lora | 40 | 25.0% (23.0% to 25.0%), 3.0, 4.00 |" in text
    assert "| 7 | phase3 | 40 | 12.5% (10.5% to 12.5%), 3.0, 4.00 |" in text
    assert "| 80.0% | 20.0% | 30.0% | 1.50 |" in text and "| 5 | 12.5%, 50.0%, 42.5% |" in text
    assert "batch_seconds" not in (tmp_path / "latent.jsonl").read_text()
