"""The parts that run commands and readers, with the processes and the files that they need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.fuzz import world
from tests.fuzz.cases import Part
from tests.fuzz.children import Children
from tests.fuzz.options import Options
from tests.fuzz.readers import Readers

#: Names of all parts, and the number of cases that the tests run.
CASES = {"options": 400, "readers": 180, "weights": 100}


@contextmanager
def made(folder: Path, seed: int = 0) -> Iterator[dict[str, Part]]:
    """The parts ``options`` and ``readers``, with their files in ``folder``, which is empty.

    Raises:
        AssertionError: A case has changed files outside its own folder.
    """
    home, files = folder / "home", folder / "world"
    home.mkdir()
    files.mkdir()
    children = Children(home)
    try:
        world.make(files, children)
        before = world.listing(files)
        yield {
            "options": Options(children, files, folder / "options", seed),
            "readers": Readers(children, files, folder / "readers"),
        }
        after = world.listing(files)
        changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
        if changed:
            raise AssertionError(f"files that no command was to write have changed: {', '.join(changed)}")
    finally:
        children.close()
