"""Tests of ``llm-trm bench`` on the suites of training steps, peers and scaling."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import llm_trm.cli.bench as bench_module
from llm_trm.cli import main


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["bench", "--device", "cpu", *arguments], prog_name="llm-trm")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--mode", "step", "--dtype", "fp16"), ("loss scaling", "bf16")),
        (("--suite", "train", "--mode", "forward"), ("--suite train", "no case")),
        (("--suite", "scaling", "--mode", "train"), ("--suite scaling", "no case")),
        (("--suite", "peers", "--backends", "liger"), ("liger", "CUDA device")),
        (("--suite", "peers", "--backends", "compile-max"), ("compile-max", "CUDA device")),
    ],
)
def test_invalid_measurements_give_one_line_and_exit_code_2(
    arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


def test_missing_peer_is_named_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "tiny_recursive_model" else find_spec(name, *rest),
    )
    result = run("--suite", "peers", "--backends", "tiny-recursive-model")
    assert result.exit_code == 2
    assert 'pip install "llm-trm[peers]"' in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("suite", "mode", "backends"), [("train", "step", "original,eager"), ("peers", "step", "eager,official")]
)
def test_suites_are_recorded_under_their_group(
    suite: str, mode: str, backends: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(bench_module._TIMED_SECONDS, "cpu", 0.1)
    file = tmp_path / "results.jsonl"
    options = ("--quick", "--backends", backends, "--budget", "200", "--json", str(file))
    result = run("--suite", suite, "--mode", mode, *options)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert {line["case"]["family"] for line in lines} == {"seed", "paper"}
    for line in lines:
        assert line["case"]["mode"] == mode
        assert line["group"] == ("peers" if suite == "peers" else "main")
        assert line["name"].startswith("peers: ") == (suite == "peers")
        assert "eager" in {row["backend"] for row in line["rows"] if row["status"] == "ok"}


def test_scaling_reports_omitted_points_and_plots_curves(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "curves.png"
    # The budget of one second ends before the first case, so every row is skipped.
    result = run("--suite", "scaling", "--backends", "eager", "--budget", "1", "--plot", str(picture))
    assert result.exit_code == 0, result.output
    assert "omitted on a CPU" in result.stdout
    assert "batch size 1024" in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
