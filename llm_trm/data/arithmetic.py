"""The arithmetic world: problems that a tiny language model can solve only by thinking.

A problem is a chain of operations on a running total, evaluated from left to right modulo ``modulus``:
``7+5*3-8`` is ``((7 + 5) * 3 - 8) mod 10 = 8``. Its worked trace shows every intermediate total.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from llm_trm.errors import InputError
from llm_trm.ranges import COUNT, MODULUS, OPERATIONS, shown
from llm_trm.settings import Settings, setting

Split = Literal["train", "test"]

#: One problem in this many is held out, chosen by a hash of its question and independent of the seed.
_HELD_OUT = 8
_OPERATORS = "+-*"


@dataclass(frozen=True)
class Problem:
    """One problem with its worked solution.

    Attributes:
        question: The question, ``7+5*3-8``.
        thinking: The worked trace, ``7+5=2;2*3=6;6-8=8``.
        answer: The last total, ``8``.
        operations: Number of operations in the chain, which is its difficulty.
    """

    question: str
    thinking: str
    answer: str
    operations: int

    def record(self) -> dict[str, str | int]:
        """The problem as a JSONL record."""
        return {
            "question": self.question,
            "thinking": self.thinking,
            "answer": self.answer,
            "operations": self.operations,
        }


@dataclass(frozen=True)
class World(Settings):
    """The arithmetic problems that exist.

    The number of operations is drawn uniformly. A chain starts with 1 .. modulus - 1, and totals are in
    0 .. modulus - 1.

    Raises:
        InputError: An empty range, or a value out of range.
    """

    min_operations: int = setting(1, "Minimum number of operations in an arithmetic problem.", OPERATIONS)
    max_operations: int = setting(
        5,
        "Maximum number of operations in an arithmetic problem: its difficulty.",
        OPERATIONS,
        "--operations",
    )
    modulus: int = setting(10, "Totals of arithmetic problems are taken modulo this number.", MODULUS)
    max_operand: int | None = setting(
        None, "Largest operand after the first number; smaller is easier.", COUNT, unset="modulus - 1"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_operations > self.max_operations:
            raise InputError(
                "operations must be a range from 1 upwards, not "
                f"{self.min_operations} to {self.max_operations}"
            )
        if self.max_operand is not None and self.max_operand >= self.modulus:
            raise InputError(
                f"the largest operand must be from 1 to {self.modulus - 1}, not {self.max_operand}"
            )

    def draw(self, generator: random.Random) -> Problem:
        """Sample a problem of either split."""
        operations = generator.randint(self.min_operations, self.max_operations)
        total = generator.randrange(1, self.modulus)
        largest = self.modulus - 1 if self.max_operand is None else self.max_operand
        question, steps = [str(total)], []
        for _ in range(operations):
            operator, operand = generator.choice(_OPERATORS), generator.randint(1, largest)
            before = total
            total = _apply(operator, total, operand) % self.modulus
            question.append(f"{operator}{operand}")
            steps.append(f"{before}{operator}{operand}={total}")
        return Problem("".join(question), ";".join(steps), str(total), operations)

    def problem(self, split: Split, seed: int, index: int) -> Problem:
        """Problem ``index`` of the infinite sequence given by ``split`` and ``seed``."""
        if split not in get_args(Split):
            raise InputError(f"split must be one of {', '.join(get_args(Split))}, not {shown(split)}")
        # A string seed is hashed with SHA-512, the same in every process and version.
        generator = random.Random(f"{split}/{seed}/{index}")
        while True:
            problem = self.draw(generator)
            if held_out(problem.question) == (split == "test"):
                return problem

    def problems(self, count: int, split: Split = "train", seed: int = 0) -> Iterator[Problem]:
        """The first ``count`` problems of a split. The two splits have no question in common."""
        return (self.problem(split, seed, index) for index in range(count))


def held_out(question: str) -> bool:
    """Whether a question belongs to the test split."""
    return hashlib.sha256(question.encode()).digest()[0] % _HELD_OUT == 0


def _apply(operator: str, left: int, right: int) -> int:
    if operator == "+":
        return left + right
    return left - right if operator == "-" else left * right
