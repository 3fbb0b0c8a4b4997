"""Cases, what becomes of them, and the report of a part."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

#: Longest error: the start and the end of a message, and the advice.
LONGEST_LINE = 1700


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
        what: The case in words, for a person to repeat it.
        kind: What happened, to count: accepted, refused, ...
        fault: What is wrong with that; None if nothing.
        said: The error, if there was one.
    """

    what: str
    kind: str
    fault: str | None = None
    said: str = ""


@dataclass
class Tally:
    """Counts the cases of a part, and collects the failed ones.

    Attributes:
        part: Name of the part.
        seed: Seed of the cases.
        tried: Number of cases.
        kinds: Number of cases by what happened.
        failed: Descriptions of the failed cases.
    """

    part: str
    seed: int
    tried: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def add(self, number: int, outcome: Outcome) -> str | None:
        """Count a case; returns the description of a failed one."""
        self.tried += 1
        self.kinds[outcome.kind] = self.kinds.get(outcome.kind, 0) + 1
        if outcome.fault is None:
            return None
        again = f"python -m tests.fuzz {self.part} --seed {self.seed} --case {number}"
        self.failed.append(f"{outcome.fault}\n    {outcome.what}\n    repeat: {again}")
        return self.failed[-1]

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items()))
        return f"{self.part}: tried {self.tried} ({kinds}), failed {len(self.failed)}"


#: A part runs the case of a number and a seed.
Part = Callable[[int, random.Random], Outcome]


def run(
    name: str, part: Part, seed: int, numbers: Iterator[int], seconds: float, say: Callable[[str], Any]
) -> Tally:
    """Run the cases ``numbers`` of a part, at most for some seconds, and report failed ones at once."""
    tally, end = Tally(name, seed), time.monotonic() + seconds
    for number in numbers:
        if time.monotonic() > end:
            break
        # Cases do not depend on those before them.
        if (failed := tally.add(number, part(number, random.Random(f"{seed}/{number}")))) is not None:
            say(failed)
    return tally


def fault_of_message(message: str) -> str | None:
    """What is wrong with the message of an error, which must be a line that can be read."""
    if "\n" in message.strip("\n"):
        return "the error has several lines"
    if not message.strip():
        return "the error says nothing"
    if len(message) > LONGEST_LINE:
        return f"the error has {len(message)} characters"
    return None
