"""Files that are replaced together."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from llm_trm import publishing as module
from llm_trm.publishing import publishing, uninterrupted


def write(folder: Path, **named: str) -> None:
    for name, text in named.items():
        (folder / name).write_text(text)


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_files_are_replaced_together_and_others_stay(tmp_path: Path) -> None:
    write(tmp_path, index="old", a="old", b="old", mine="mine")
    with publishing(tmp_path, "index", stale=("a", "b", "absent")) as temporary:
        write(temporary, index="new", a="new", c="new")
        assert (tmp_path / "a").read_text() == "old"
    assert content(tmp_path) == {"index": "new", "a": "new", "c": "new", "mine": "mine"}


def test_an_error_keeps_the_old_files(tmp_path: Path) -> None:
    write(tmp_path, index="old", a="old")
    with pytest.raises(RuntimeError), publishing(tmp_path, "index", stale=("a",)) as temporary:
        write(temporary, index="new")
        raise RuntimeError
    assert content(tmp_path) == {"index": "old", "a": "old"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_until_the_files_are_exchanged(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StopError(Exception):
        pass

    def stop(*_: object) -> None:
        raise StopError

    moved: list[str] = []
    before = module.publish

    def interrupted(temporary: Path, path: Path) -> None:
        moved.append(path.name)
        signal.raise_signal(number)
        before(temporary, path)

    monkeypatch.setattr(module, "publish", interrupted)
    write(tmp_path, index="old", z="old")
    handler = signal.signal(number, stop)
    try:
        with pytest.raises(StopError), publishing(tmp_path, "index") as temporary:
            write(temporary, index="new", z="new")
        assert signal.getsignal(number) is stop
    finally:
        signal.signal(number, handler)
    assert moved == ["z", "index"]
    assert content(tmp_path) == {"index": "new", "z": "new"}


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with uninterrupted():
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
