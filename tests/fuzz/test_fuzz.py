"""A small, fixed set of cases of each part; ``python -m tests.fuzz`` runs others."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.fuzz.cases import Part, run
from tests.fuzz.parts import CASES, made
from tests.fuzz.weights import Weights

pytestmark = pytest.mark.fuzz


def check(name: str, part: Part) -> None:
    tally = run(name, part, 0, iter(range(CASES[name])), float("inf"), lambda _: None)
    print(tally)
    assert not tally.failed, f"{tally}\n" + "\n".join(tally.failed)


@pytest.mark.skipif(sys.platform != "linux", reason="children are limited and watched as Linux allows")
def test_options_and_readers(tmp_path: Path) -> None:
    # One test, as both need the same files.
    with made(tmp_path) as parts:
        for name in ("options", "readers"):
            check(name, parts[name])


@pytest.mark.interpreter
def test_weights() -> None:
    check("weights", Weights())
