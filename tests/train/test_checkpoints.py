"""Checkpoints are there whole or not at all, the best few and the last."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm_trm.errors import InputError
from llm_trm.train.run import checkpoints as module
from llm_trm.train.run.checkpoints import Checkpoints
from llm_trm.train.run.run import Progress
from llm_trm.train.run.training_state import write_state


def save(checkpoints: Checkpoints, number: int, loss: float | None) -> None:
    with checkpoints.new(f"step-{number:08d}", loss) as folder:
        write(folder, str(number))


def write(folder: Path, content: str) -> None:
    write_state(folder, Progress(sums={}, steps=0.0, history=[], settings={}), {})
    (folder / "content").write_text(content)


def names(*numbers: int) -> set[str]:
    return {f"step-{number:08d}" for number in numbers}


def present(folder: Path) -> set[str]:
    return {path.name for path in (folder / "checkpoints").iterdir()}


def test_the_best_three_and_the_last_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    for number, loss in enumerate([5.0, 2.0, 4.0, None, 3.0, 6.0, float("nan"), None]):
        save(checkpoints, number, loss)
    assert checkpoints.last.name == "step-00000007"
    assert checkpoints.best is not None and checkpoints.best.name == "step-00000001"
    assert present(tmp_path) == names(1, 4, 2, 7)
    assert (checkpoints.last / "content").read_text() == "7"
    save(checkpoints, 8, 1.0)
    assert present(tmp_path) == names(8, 1, 4)


def test_of_equals_the_first_is_the_best(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for number in range(3):
        save(checkpoints, number, 1.0)
    assert checkpoints.best is not None and checkpoints.best.name == "step-00000000"


class Crash(BaseException):
    pass


@pytest.mark.parametrize("at", ["content", "rename", "index", "sweep"])
def test_a_crash_leaves_the_old_state_or_the_new(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 0, 2.0)

    def crash(*_: object) -> None:
        raise Crash

    with monkeypatch.context() as patched, pytest.raises(Crash):
        if at == "rename":
            patched.setattr(Path, "replace", crash)
        elif at == "index":
            patched.setattr(module, "write_json", crash)
        elif at == "sweep":
            patched.setattr(Checkpoints, "_remove", crash)
        with checkpoints.new("step-00000001", 1.0) as folder:
            write(folder, "half")
            if at == "content":
                raise Crash
            (folder / "content").write_text("1")
    survivor = Checkpoints(tmp_path, keep=1)
    expected = "1" if at == "sweep" else "0"
    assert survivor.best == survivor.last
    assert (survivor.last / "content").read_text() == expected
    # The run goes on, saves the same checkpoint again, and nothing of the crash is left.
    if at != "sweep":
        save(survivor, 1, 1.0)
    else:
        survivor.go_on_from(survivor.last)
    assert present(tmp_path) == names(1)
    assert (survivor.last / "content").read_text() == "1"


def test_a_checkpoint_that_counts_is_not_replaced(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 0, 2.0)
    with pytest.raises(ValueError, match="exists already"):
        save(checkpoints, 0, 1.0)
    assert (checkpoints.last / "content").read_text() == "0"


def test_clear_removes_all(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 0, 2.0)
    checkpoints.clear()
    assert not checkpoints.exist()
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("content", ["", "[]", json.dumps({"last": "c0"})])
def test_a_broken_index_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(InputError, match=r"index\.json"):
        _ = Checkpoints(tmp_path).last
