"""The fuzzers see the faults that they look for."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.fuzz.cases import run
from tests.fuzz.child import Content
from tests.fuzz.children import Children, Ended
from tests.fuzz.judging import judge
from tests.fuzz.mutations import mutate
from tests.fuzz.weights import Weights
from trm_kernels import native_module, native_weights

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="children are watched as Linux allows")

LINE = "llm-trm: error: x: choose another\n"


@pytest.fixture(scope="module")
def children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Children]:
    found = Children(tmp_path_factory.mktemp("home"))
    yield found
    found.close()


def test_children_return_fail_and_end(children: Children, tmp_path: Path) -> None:
    def child(function: str, *arguments: object, seconds: float = 20.0) -> Ended:
        return children.run(function, *arguments, folder=tmp_path, seconds=seconds)

    assert child("os:getcwd").value == str(tmp_path)
    assert child("builtins:print", "words").out == "words\n"
    assert child("os:_exit", 3).status == 3
    assert "JSONDecodeError" in child("json:loads", "{").err
    late = child("time:sleep", 60, seconds=0.2)
    assert (late.stopped, late.status) == (True, -15)
    assert "MemoryError" in child("builtins:bytearray", 2**40).err


@pytest.mark.parametrize(
    ("status", "err", "code", "refuse", "kind", "fault"),
    [
        (0, "", 0, False, "accepted", None),
        (0, LINE, 2, False, "refused", None),
        (0, f"reading\n{LINE}", 2, True, "refused", None),
        (0, "", 0, True, "accepted", "it must be refused"),
        (0, f"{LINE}more\n", 2, False, "refused", "several lines"),
        (0, "", 2, False, "refused", "says nothing"),
        (0, f"llm-trm: error: {'x' * 5000}", 2, False, "refused", "5016 characters"),
        (0, "", 1, False, "other code", "exit code 1"),
        (1, "Traceback (most recent call last):\nKeyError: 'x'", None, False, "traceback", "KeyError"),
        (None, "", None, False, "hung", "does not end"),
    ],
)
def test_commands_are_judged(
    status: int | None, err: str, code: int | None, refuse: bool, kind: str, fault: str | None
) -> None:
    value = None if code is None else {"code": code, "faults": []}
    found = judge("train lm", Ended(status, False, "", err, value, 0.0), refuse=refuse)
    assert found[0] == kind
    assert (found[1] is None) == (fault is None)
    assert fault is None or fault in str(found[1])


def test_nan_is_found_in_what_is_read() -> None:
    content = Content()
    content.add({"a": [torch.tensor([1.0, float("nan")])], "b": (1.0, float("inf")), "c": torch.ones(2)})
    assert content.faults == ["it.a[0] has NaN or infinity", "it.b[1] is inf"]


def test_damage_is_damage_and_repeats(tmp_path: Path) -> None:
    path, before = tmp_path / "x.json", '{"a": [1, {"b": "c"}]}'
    found = []
    for number in range(200):
        for _ in range(2):
            path.unlink(missing_ok=True) if not path.is_dir() else path.rmdir()
            path.write_text(before)
            found.append((mutate(path, random.Random(number)), path.read_bytes() if path.is_file() else None))
    assert found[::2] == found[1::2]
    assert sum(content == before.encode() for _, content in found) < 10
    assert len({how for how, _ in found}) > 100


@pytest.mark.skipif(native_module.unavailable() is not None, reason="the native module is not compiled")
def test_stale_weights_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_weights, "_digest", lambda *_: ())
    tally = run("weights", Weights(), 0, iter(range(5)), float("inf"), lambda _: None)
    assert len(tally.failed) > 2
    assert "--seed 0 --case" in tally.failed[0]
