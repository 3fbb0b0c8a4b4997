"""The notebook, run on the tiny model.

The test executes its code cells in order, as a kernel does. Jupyter itself would add about thirty packages to
the test dependencies and a second process that imports torch, to run the same Python.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

NOTEBOOK = Path(__file__).parents[2] / "examples" / "smollm3_trm.ipynb"


def cells() -> list[dict[str, Any]]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def code() -> list[str]:
    return ["".join(cell["source"]) for cell in cells() if cell["cell_type"] == "code"]


def test_is_a_notebook_without_outputs() -> None:
    whole = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (whole["nbformat"], whole["nbformat_minor"]) == (4, 5)
    assert whole["metadata"]["kernelspec"]["name"] == "python3"
    assert len({cell["id"] for cell in whole["cells"]}) == len(whole["cells"])
    for cell in whole["cells"]:
        assert cell["metadata"] == {} and cell["cell_type"] in ("code", "markdown")
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            # Plain Python only, and no classes, which are imported instead.
            assert not any(
                isinstance(node, ast.ClassDef) for node in ast.walk(ast.parse("".join(cell["source"])))
            )


def test_runs_on_the_tiny_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRM_MODEL", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(code()):
        exec(compile(cell, f"{NOTEBOOK.name}, code cell {number}", "exec"), names)
    out = capsys.readouterr().out
    assert "arithmetic on cpu" in out and "the same answers: True" in out
    assert len(names["problems"]) == 10 and len(names["answers"]) == 3
    assert names["losses"][-1] < names["losses"][0]
    assert names["trained"].has_adapters and not names["merged"].has_adapters
    # The model learned to start with <think>, where the recursion runs.
    assert all(answer.startswith("<think>") for answer in names["answers"])
    assert names["trm_steps"].tolist() == [[2], [2], [2]]


def test_installs_the_package_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    monkeypatch.setenv("TRM_REPO", "https://example.org/llm-trm")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("subprocess.run", lambda command, check: ran.append(command))
    exec(code()[0], {})
    source = "llm-trm[train] @ git+https://example.org/llm-trm"
    assert ran == [[sys.executable, "-m", "pip", "install", "--quiet", source]]
