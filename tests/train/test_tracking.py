"""Trackers through accelerate."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from llm_trm.choices import Track
from llm_trm.errors import InputError
from llm_trm.train.run.tracking import JSONL_FILE, finish_tracking, new_accelerator, start_tracking


def make_accelerator(track: Track | None, folder: Path, resumed_at: int | None = None) -> Any:
    accelerator = new_accelerator(track, folder, device="cpu", resumed_at=resumed_at)
    start_tracking(accelerator, "project", {"path": folder})
    return accelerator


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / JSONL_FILE).read_text().splitlines()]


def test_json_lines(tmp_path: Path) -> None:
    accelerator = make_accelerator("jsonl", tmp_path)
    accelerator.log({"loss": 0.5}, step=3)
    accelerator.log({"loss": 0.25, "cosine": 0.9}, step=6)
    finish_tracking(accelerator)
    assert lines(tmp_path) == [{"step": 3, "loss": 0.5}, {"step": 6, "loss": 0.25, "cosine": 0.9}]


def test_resumed_run_drops_lines_of_later_steps_and_half_ones(tmp_path: Path) -> None:
    (tmp_path / JSONL_FILE).write_text('{"step": 3, "loss": 1}\n{"step": 6, "loss": 2}\n{"step": 5, "lo')
    accelerator = make_accelerator("jsonl", tmp_path, resumed_at=3)
    accelerator.log({"loss": 7.0}, step=4)
    assert lines(tmp_path) == [{"step": 3, "loss": 1}, {"step": 4, "loss": 7.0}]


def test_new_run_begins_the_file_anew_and_only_when_it_starts(tmp_path: Path) -> None:
    (tmp_path / JSONL_FILE).write_text('{"step": 3}\n')
    new_accelerator("jsonl", tmp_path, device="cpu")
    assert lines(tmp_path) == [{"step": 3}]
    make_accelerator("jsonl", tmp_path)
    assert lines(tmp_path) == []


def test_no_tracker_writes_nothing(tmp_path: Path) -> None:
    accelerator = make_accelerator(None, tmp_path)
    accelerator.log({"loss": 0.5}, step=3)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("track", ["wandb", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_named(
    track: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == track else find(name))
    with pytest.raises(InputError, match=rf"pip install {track}, or use --track jsonl"):
        new_accelerator(track, tmp_path, device="cpu")


def test_accelerate_s_own_trackers_get_project_and_plain_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """wandb and tensorboard are accelerate's: what counts is that they are asked for, with what they take."""
    accelerator = new_accelerator(None, tmp_path, device="cpu")
    found: list[tuple[str, dict[str, Any]]] = []
    accelerator.log_with = ["wandb"]
    monkeypatch.setattr(accelerator, "init_trackers", lambda project, config: found.append((project, config)))
    from llm_trm.train.run.tracking import start_tracking

    start_tracking(accelerator, "project", {"path": tmp_path, "rate": 0.5, "none": None, "flag": True})
    assert found == [("project", {"path": str(tmp_path), "rate": 0.5, "none": "None", "flag": True})]
