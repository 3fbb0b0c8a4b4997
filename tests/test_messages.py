"""Values, names and errors as messages quote them."""

from __future__ import annotations

import errno

import pytest

from llm_trm.errors import few, listed, system_error
from llm_trm.ranges import shown


@pytest.mark.parametrize(
    ("value", "quoted"),
    [
        ("short", "'short'"),
        ("x" * 41, f"'{'x' * 40}'..."),  # the quote is closed
        ("a\nb", "'a\\nb'"),
        ("\udcff", "'\\udcff'"),
        ([], "[]"),
        (["x" * 100], f"['{'x' * 38}..."),
        (None, "None"),
    ],
)
def test_a_value_is_quoted(value: object, quoted: str) -> None:
    assert shown(value) == quoted


def test_names_are_listed() -> None:
    assert listed(["a", "b\nc"]) == "a, b c"
    assert listed(["x" * 200]) == f"{'x' * 160}..."
    assert few(["a", "b", "c"]) == "a, b, c"
    assert few(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), 28),
        (OSError("transformers' own"), None),
        # safetensors before 0.5
        (RuntimeError('IoError(Os { code: 27, kind: FileTooLarge, message: "File too large" })'), 27),
        (RuntimeError("os error"), None),
    ],
)
def test_the_number_of_a_system_error(error: Exception, number: int | None) -> None:
    assert system_error(error) == number


def test_a_huge_number_is_not_written_out() -> None:
    assert shown(10**5000) == "a number with thousands of digits"
