"""Checks the output files of a command before its work starts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from itertools import combinations
from pathlib import Path

from llm_trm.errors import InputError
from llm_trm.files import is_special, require_new


def require_new_files(
    outputs: Mapping[str, Path | None], *, overwrite: bool, inputs: Iterable[Path | None] = ()
) -> None:
    """Raise InputError unless the output files of a command may be written.

    Args:
        outputs: Files by the option that names them; None if the option is not given.
        overwrite: Whether files that exist may be replaced.
        inputs: Files that the command reads. They are never replaced.
    """
    given = {option: path for option, path in outputs.items() if path is not None}
    for option, path in given.items():
        if any(_same(path, read) for read in inputs if read is not None):
            raise InputError(f"{option} {path} is also an input: choose another {option}")
        require_new(path, overwrite=overwrite, option=option)
        # A new file takes the place of the old one, which needs a folder that can be written.
        folder = path.resolve().parent
        if not is_special(path) and not os.access(folder, os.W_OK | os.X_OK):
            raise InputError(f"{option} {path}: the folder {folder} is read-only: choose another {option}")
    for (first, one), (second, other) in combinations(given.items(), 2):
        if _same(one, other):
            raise InputError(f"{first} and {second} are both {one}: choose two different files")


def _same(one: Path, other: Path) -> bool:
    if is_special(one):  # /dev/null, for example
        return False
    return one.resolve() == other.resolve() or (one.exists() and other.exists() and one.samefile(other))
