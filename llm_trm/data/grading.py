"""Compares a model's response with the reference answer."""

from __future__ import annotations

import re
from fractions import Fraction

#: A minus after a digit, letter or bracket is subtraction; a comma not before three digits separates items.
_NUMBER = re.compile(
    r"(?:(?<![\w)\]}])-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:/[1-9]\d*(?![\d.]))?"
)
_FRACTION = re.compile(r"\\[dt]?frac\{(\d+)\}\{([1-9]\d*)\}")
#: LaTeX that does not change the meaning of an answer.
_LATEX_NOISE = re.compile(r"\\left|\\right|\\[!,;: ]|[\s$]")


def is_correct(response: str, answer: str) -> bool | None:
    """Compare the final answer of ``response`` with the final answer of the reference ``answer``.

    A final answer follows ``####`` on the same line (GSM8K), is in ``\\boxed{}`` (MATH), or is the whole
    text if that is a single line. For a response it may also be the last number. Numbers are compared by
    value: ``1,000.0`` equals ``1000``.

    Returns:
        Whether they are equal; None if the reference's final answer cannot be identified.
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
    numbers = _NUMBER.findall(_spelt(response if said is None else said))
    return bool(numbers) and _number(numbers[-1]) == number


def _marked(text: str) -> str | None:
    """The rest of the line after the last ``####``, or the content of the last ``\\boxed{}``."""
    _, mark, rest = text.rpartition("####")
    if mark:
        return rest.strip().partition("\n")[0].strip()
    _, mark, rest = text.rpartition(r"\boxed{")
    depth = 1 if mark else 0
    for end, character in enumerate(rest if mark else ""):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[:end].strip()
    return None


def _number(text: str) -> Fraction | None:
    text = _spelt(text).strip().strip("$").rstrip(".")
    return _divided(text.replace(",", "")) if _NUMBER.fullmatch(text) else None


def _divided(text: str) -> Fraction:
    over, _, under = text.partition("/")
    return Fraction(over) / Fraction(under or "1")


def _spelt(text: str) -> str:
    """``text`` with Unicode minus signs and simple LaTeX fractions in plain notation."""
    return _FRACTION.sub(r"\1/\2", text.replace("\N{MINUS SIGN}", "-"))


def _plain(text: str) -> str:
    return _LATEX_NOISE.sub("", text).replace("dfrac", "frac").replace("tfrac", "frac").rstrip(".")
