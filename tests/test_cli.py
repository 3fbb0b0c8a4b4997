"""The ``llm-trm`` command: what it prints, what it refuses, and how."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner, Result

import trm_kernels
from llm_trm.cli import main
from tests.commands import commands
from trm_kernels import backends

QUICK = ("bench", "--device", "cpu", "--suite", "quick", "--budget", "20")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), prog_name="llm-trm")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("bench", "--latents", "0"), ("--latents", "at least 1")),
        (("bench", "--batch-size", "-3"), ("--batch-size",)),
        (("bench", "--latents", "many"), ("--latents", "many")),
        (("bench", "--d-model", "100"), ("--d-model 100", "--heads 8")),
        (("bench", "--heads", "7"), ("multiple", "--heads 7")),
        (("bench", "--family", "paper", "--d-model", "24", "--heads", "8"), ("even head size",)),
        (("bench", "--dtype", "int8"), ("--dtype", "fp32")),
        (("bench", "--backends", "cudnn"), ("unknown backend 'cudnn'", "eager")),
        (("bench", "--backends", ","), ("--backends", "name at least one")),
        (("bench", "--device", "cpu", "--backends", "eager+graph"), ("eager+graph", "CUDA")),
        (("bench", "--suite", "quick", "--latents", "8"), ("--latents", "--suite")),
        (("bench", "--suite", "nope"), ("--suite", "quick")),
        (("bench", "--device", "cpu", "--suite", "latents", "--mode", "train"), ("no case",)),
        (("bench", "--json", "/no/such/folder/x.jsonl"), ("--json", "does not exist")),
        (("bench", "--json", "/"), ("--json", "is a folder")),
        (("bench", "--plot", "speed.txt"), ("--plot", ".png")),
        (("bench", "--no-such-option"), ("--no-such-option",)),
        (("no-such-command",), ("no-such-command",)),
    ],
)
def test_nonsense_gets_one_line_and_exit_code_2(
    arguments: tuple[str, ...], words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_work(*_: object) -> None:
        raise AssertionError("work was begun before the arguments were checked")

    monkeypatch.setattr("llm_trm.cli.bench._run", no_work)
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_that_is_not_there_is_refused() -> None:
    result = run("bench", "--device", "cuda")
    assert result.exit_code == 2
    assert "--device cpu" in result.stderr
    assert result.stderr.count("\n") == 1


def test_backend_named_that_cannot_run_is_refused_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = backends.Backend("native", "", lambda: "moon phase", lambda *_: None, lambda *_: None)  # type: ignore[arg-type, return-value]
    monkeypatch.setitem(backends.BACKENDS, "native", broken)
    result = run("bench", "--device", "cpu", "--backends", "native")
    assert result.exit_code == 2
    assert "moon phase" in result.stderr


def test_plot_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "matplotlib" else find_spec(name, *rest),
    )
    result = run(*QUICK, "--plot", str(tmp_path / "speed.png"))
    assert result.exit_code == 2
    assert 'pip install "llm-trm[plot]"' in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        *[(), ("bench",), ("env",), ("tune",), ("datagen",), ("generate",), ("solve",)],
        *[("eval", name) for name in ("lm", "phase2", "puzzle")],
        *[("data", name) for name in ("arc", "arithmetic", "maze", "sudoku")],
    ],
)
def test_help_teaches_without_importing_torch(arguments: tuple[str, ...]) -> None:
    code = (
        "import sys; from llm_trm.cli import main\n"
        f"try: main([*{arguments!r}, '--help'], prog_name='llm-trm')\n"
        "finally: assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "llm-trm " in done.stdout.partition("Usage:")[2].partition("\n")[2], "an example"


def test_every_option_has_help() -> None:
    for path, command in commands():
        for parameter in command.params:
            if isinstance(parameter, click.Argument):
                continue  # the text of the help speaks of it
            assert isinstance(parameter, click.Option)
            assert parameter.help, f"{path} {parameter.opts}"


def test_version() -> None:
    assert run("--version").stdout == f"llm-trm {trm_kernels.__version__}\n"


def test_env_reports_every_backend_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = backends.Backend("native", "for tests", lambda: "moon phase", lambda *_: None, lambda *_: None)  # type: ignore[arg-type, return-value]
    monkeypatch.setitem(backends.BACKENDS, "native", broken)
    monkeypatch.setenv("TRM_BACKEND", "eager")
    facts = json.loads(run("env", "--json").stdout)
    assert facts["versions"]["torch"] == torch.__version__
    assert set(facts["backends"]) == set(backends.BACKENDS)
    assert facts["backends"]["eager"]["unavailable"] is None
    assert facts["backends"]["native"]["unavailable"] == "moon phase"
    assert facts["TRM_BACKEND"] == "eager"
    cpu = facts["devices"][0]
    assert cpu["device"] == "cpu"
    assert cpu["auto"] == "eager"
    assert cpu["passed_over"]["native"] == "moon phase"
    text = run("env").stdout
    assert "moon phase" in text
    assert "auto selects eager" in text


def test_bench_prints_and_records_both_modes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "results.jsonl", tmp_path / "speed.png"
    options = ("--backends", "original,eager", "--json", str(file), "--plot", str(picture))
    result = run(*QUICK, *options)
    assert result.exit_code == 0, result.output
    for word in ("forward", "train", "original", "eager", "p20", "TFLOP/s", "of limit", "peak MiB", "error"):
        assert word in result.stdout
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["case"]["mode"] for line in lines] == ["forward", "train"]
    for line in lines:
        assert line["versions"]["torch"] == torch.__version__
        assert [row["backend"] for row in line["rows"]] == ["original", "eager"]
        for row in line["rows"]:
            assert row["status"] == "ok"
            assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
            assert row["peak_bytes"] > 0
            assert 0 < row["errors"]["output"] < 1e-5
            assert row["tflops"] == pytest.approx(row["tflops"])
        original, eager = line["rows"]
        assert original["speedup"]["eager"] == pytest.approx(eager["median_ms"] / original["median_ms"])
    assert set(lines[1]["rows"][1]["errors"]) == {"output", "gradients"}
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_wrong_result_is_marked_and_its_speed_withheld(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def slightly_wrong(net: trm_kernels.TinyRecursiveNetwork, x: torch.Tensor, mask: None) -> torch.Tensor:
        return net.forward_eager(x, mask) * 1.001

    wrong = backends.Backend("native", "", lambda: None, lambda *_: None, slightly_wrong)  # type: ignore[arg-type]
    monkeypatch.setitem(backends.BACKENDS, "native", wrong)
    file = tmp_path / "results.jsonl"
    result = run(*QUICK, "--mode", "forward", "--backends", "eager,native", "--json", str(file))
    assert result.exit_code == 1
    assert "WRONG" in result.stdout
    row = json.loads(file.read_text())["rows"][1]
    assert row["status"] == "wrong"
    assert row["median_ms"] is None
    assert row["speedup"] == {}
    assert row["errors"]["output"] > 1e-4


def test_candidate_that_raises_gets_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> torch.Tensor:
        raise RuntimeError("no luck today")

    failing = backends.Backend("native", "", lambda: None, lambda *_: None, fails)
    monkeypatch.setitem(backends.BACKENDS, "native", failing)
    result = run(*QUICK, "--mode", "forward", "--backends", "eager,native")
    assert result.exit_code == 1
    assert "no luck today" in result.stdout


def test_what_does_not_fit_the_budget_is_skipped_and_says_so() -> None:
    options = ("--d-model", "2048", "--mode", "train", "--backends", "eager")
    result = run("bench", "--device", "cpu", *options, "--budget", "1")
    assert result.exit_code == 0, result.output
    assert "skipped" in result.stdout
    assert "--budget" in result.stdout
