"""A small, fixed set of cases of each part; ``python -m tests.fuzz`` runs others."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.fuzz.cases import Part, run
from tests.fuzz.parts import CASES, made

pytestmark = [
    pytest.mark.fuzz,
    pytest.mark.skipif(sys.platform != "linux", reason="children are limited and watched as Linux allows"),
]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Part]]:
    with made(tmp_path_factory.mktemp("fuzz")) as found:
        yield found


@pytest.mark.parametrize("name", CASES)
def test_no_traceback_and_no_nonsense(name: str, parts: dict[str, Part]) -> None:
    tally = run(name, parts[name], 0, iter(range(CASES[name])), float("inf"), lambda _: None)
    print(tally)
    assert not tally.failed, f"{tally}\n" + "\n".join(tally.failed)
