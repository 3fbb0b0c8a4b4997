"""Damaged files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llm_trm.errors import InputError


def flip(path: Path, place: int, bit: int = 0) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def every_flip_is_refused(path: Path, read: Callable[[], object], step: int = 1) -> None:
    """Flip one bit in every ``step``-th byte of a file, and check that ``read`` names the file."""
    whole = path.read_bytes()
    for place in range(0, len(whole), step):
        flip(path, place, place % 8)
        with pytest.raises(InputError) as error:
            read()
        assert path.name in str(error.value), place
        assert "\n" not in str(error.value)
        path.write_bytes(whole)
    read()
