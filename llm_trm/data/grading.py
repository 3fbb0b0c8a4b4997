"""Whether what a model said is the reference answer."""

from __future__ import annotations

import re
from fractions import Fraction

_NUMBER = re.compile(r"-?(?:\d[\d,]*)?\.?\d+(?:/[1-9]\d*)?")
#: Spellings that make no difference in a LaTeX answer.
_LATEX_NOISE = re.compile(r"\\left|\\right|\\[!,;: ]|[\s$]")


def is_correct(response: str, answer: str) -> bool | None:
    """Compare the final answer of ``response`` with that of the reference ``answer``.

    A final answer stands after ``####`` (GSM8K), in ``\\boxed{}`` (MATH), or is the whole text of one line; a
    response may also name a number last. Numbers are compared as numbers: ``1,000.0`` is ``1000``.

    Returns:
        None if the reference has no final answer that could be told from its explanation.
    """
    wanted = _marked(answer)
    if wanted is None:
        wanted = answer.strip()
        if not wanted or "\n" in wanted:
            return None
    said = _marked(response)
    number = _number(wanted)
    if number is None:
        return _plain(response if said is None else said) == _plain(wanted)
    numbers = _NUMBER.findall(response if said is None else said)
    return bool(numbers) and _number(numbers[-1]) == number


def _marked(text: str) -> str | None:
    """What stands after the last ``####`` or in the last ``\\boxed{}``."""
    _, mark, behind = text.rpartition("####")
    if mark:
        return behind.strip()
    _, mark, behind = text.rpartition(r"\boxed{")
    depth = 1 if mark else 0
    for end, character in enumerate(behind if mark else ""):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return behind[:end].strip()
    return None


def _number(text: str) -> Fraction | None:
    text = text.strip().strip("$").rstrip(".")
    return Fraction(text.replace(",", "")) if _NUMBER.fullmatch(text) else None


def _plain(text: str) -> str:
    return _LATEX_NOISE.sub("", text).replace("dfrac", "frac").replace("tfrac", "frac").rstrip(".")
