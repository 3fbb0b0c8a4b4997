"""What becomes of a command, and whether that is right."""

from __future__ import annotations

import shlex

from tests.fuzz.cases import fault_of_message
from tests.fuzz.children import Ended

#: Codes that a command may end with; bench, solve and tune document 1.
_CODES = {0, 2, 130, 143, -15}
_WITH_ONE = ("bench", "solve", "tune")


def judge(command: str, ended: Ended, *, refuse: bool) -> tuple[str, str | None]:
    """What happened to a command, and what is wrong with that.

    Args:
        refuse: Whether the arguments must be refused.
    """
    if ended.status is None:
        return "hung", "it does not end, even after SIGTERM"
    if "Traceback (most recent call last)" in ended.err:
        return "traceback", f"a traceback: {last_line(ended.err)}"
    found = ended.value or {"code": ended.status, "faults": []}
    code, faults = found["code"], found["faults"]
    if code not in _CODES and not (code == 1 and command in _WITH_ONE):
        return "other code", f"exit code {code!r}: {last_line(ended.err)}"
    if code == 2:
        errors = [line for line in ended.err.split("\n") if line.startswith("llm-trm: error:")]
        message = ended.err[ended.err.find("llm-trm: error:") :] if errors else ""
        fault = fault_of_message(message)
        return "refused", (f"{fault}: {message[:200]!a}" if fault else "; ".join(faults) or None)
    if refuse:
        return "accepted", "it must be refused"
    return "stopped" if ended.stopped else "accepted", "; ".join(faults) or None


def shown(line: list[str]) -> str:
    """A command line in ASCII, with long words cut."""
    words = [word if len(word) < 150 else f"{word[:40]}...({len(word)} characters)" for word in line]
    return shlex.join(words).encode(errors="backslashreplace").decode()


def last_line(text: str) -> str:
    """The last line of an output, in ASCII."""
    lines = text.strip().split("\n")
    return lines[-1][:200].encode(errors="backslashreplace").decode()
