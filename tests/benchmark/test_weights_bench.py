"""Tests of ``python -m bench.weights`` and its table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import weights
from trm_kernels import native_module, prepared

pytestmark = pytest.mark.skipif(native_module.unavailable() is not None, reason="no native kernels")


def test_it_times_every_candidate_and_draws_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / weights.RESULTS.name
    weights.main(["--widths", "16", "--threads", "1", "--seconds", "0.1", "--out", str(out)])
    (line,) = (json.loads(text) for text in out.read_text().splitlines())
    assert line["threads"] == 1 and set(line["ms"]["16"]) == set(weights.KINDS)
    for medians in line["ms"]["16"].values():
        assert set(medians) == set(weights.CANDIDATES)
    assert not prepared._freezes
    assert weights.text(tmp_path) in capsys.readouterr().out


def test_ratios_are_relative_to_eager_and_noise_is_reported(tmp_path: Path) -> None:
    medians = {"eager": 2.0, "native": 1.0, "frozen": 0.5, "changed": None}
    line = {"time": "2026", "name": "weights threads1", "device": "a CPU", "threads": 1}
    line["ms"] = {"64": {kind: medians for kind in weights.KINDS}}
    (tmp_path / weights.RESULTS.name).write_text(json.dumps(line))
    row = "2.00 | 1.00 (50%) | 0.500 (25%) | noisy"
    assert f"| 64 | 1 | {row} | {row} |" in weights.text(tmp_path)
    assert weights.text(tmp_path / "nowhere") == ""
