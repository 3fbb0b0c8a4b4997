"""Selects two attempts for each ARC test by voting over the predictions under all symmetries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llm_trm.data.puzzles.arc import Grid, crop, invert
from llm_trm.data.puzzles.arc_folder import ArcKey

#: Two attempts, which may be equal.
Attempts = tuple[Grid, Grid]

#: Rows and bytes of a grid, which identify it.
_Key = tuple[int, bytes]


@dataclass
class _Candidate:
    grid: Grid
    votes: int = 0
    probability: float = 0.0

    def add(self, probability: float) -> None:
        self.votes += 1
        self.probability += probability

    @property
    def rank(self) -> tuple[int, float]:
        return self.votes, self.probability / self.votes


@dataclass(frozen=True)
class ArcScore:
    """Fraction of solved tests.

    Attributes:
        inputs: Fraction of test inputs with a correct attempt.
        tasks: Mean over tasks of that fraction within the task, the metric that is usually published.
        scored: Number of test inputs with a known answer; the others are ignored.
    """

    inputs: float
    tasks: float
    scored: int


def vote(predictions: Sequence[tuple[Grid, float]]) -> Attempts:
    """The two grids with the most votes. Ties are broken by mean probability, then by first occurrence.

    If there is only one candidate, both attempts are equal.

    Args:
        predictions: Grids in the task's original colours and orientation, and halting probabilities.

    Raises:
        ValueError: There are no predictions.
    """
    candidates: dict[_Key, _Candidate] = {}
    for grid, probability in predictions:
        candidates.setdefault(_key(grid), _Candidate(grid)).add(probability)
    return _best(candidates)


def score(attempts: Sequence[Attempts | None], answers: Sequence[Grid]) -> float:
    """The fraction of ``answers`` that equal one of their two attempts; None is never correct."""
    right = [_is_right(pair, answer) for pair, answer in zip(attempts, answers, strict=True)]
    return sum(right) / len(right)


class ArcBallot:
    """Collects the predictions for a folder's test split, batch by batch in any order.

    Args:
        key: Content of the folder's ``arc.json``.
    """

    def __init__(self, key: ArcKey) -> None:
        self._key = key
        self._indices: dict[str, dict[_Key, list[int]]] = {}
        for name, pairs in key.tests.items():
            indices = self._indices[name] = {}
            for index, pair in enumerate(pairs):
                indices.setdefault(_key(pair.input), []).append(index)
        self._votes: dict[tuple[str, int], dict[_Key, _Candidate]] = {}

    def add(
        self,
        inputs: NDArray[np.integer],
        predictions: NDArray[np.integer],
        puzzles: NDArray[np.integer],
        probabilities: NDArray[np.floating],
    ) -> None:
        """Count the votes of a batch, ignoring rows with the blank identifier, which are padding.

        Args:
            inputs, predictions: Tokens, [B, 900].
            puzzles: Puzzle identifiers, [B].
            probabilities: Halting probabilities, [B].

        Raises:
            ValueError: A question is not a test input of its task.
        """
        rows = zip(puzzles.tolist(), crop(inputs), crop(predictions), probabilities.tolist(), strict=True)
        for number, question, prediction, probability in rows:
            if (entry := self._key.identifiers[number]) is None:
                continue
            name, transform = entry
            indices = self._indices.get(name, {}).get(_key(invert(question, transform)))
            if indices is None:
                raise ValueError(f"the question of puzzle {number} is not a test input of task {name}")
            grid = invert(prediction, transform)
            for index in indices:
                candidates = self._votes.setdefault((name, index), {})
                candidates.setdefault(_key(grid), _Candidate(grid)).add(probability)

    def attempts(self) -> dict[str, list[Attempts | None]]:
        """Two attempts for each test input of each held-out task; None for inputs without predictions."""
        return {
            name: [self._attempts(name, index) for index in range(len(pairs))]
            for name, pairs in self._key.tests.items()
        }

    def score(self) -> ArcScore | None:
        """The score; None if no answer is known."""
        fractions, solved, scored = [], 0.0, 0
        for name, pairs in self._key.tests.items():
            known = [(index, pair.output) for index, pair in enumerate(pairs) if pair.output is not None]
            if known:
                attempts = [self._attempts(name, index) for index, _ in known]
                fractions.append(score(attempts, [answer for _, answer in known]))
                solved += fractions[-1] * len(known)
                scored += len(known)
        return ArcScore(solved / scored, sum(fractions) / len(fractions), scored) if scored else None

    def submission(self) -> dict[str, list[dict[str, list[list[int]]]]]:
        """The attempts in the ARC Prize's submission format; inputs without predictions get [[0]] twice."""
        return {
            name: [
                {
                    f"attempt_{number}": grid.tolist()
                    for number, grid in enumerate(pair or (_BLACK, _BLACK), 1)
                }
                for pair in attempts
            ]
            for name, attempts in self.attempts().items()
        }

    def _attempts(self, name: str, index: int) -> Attempts | None:
        candidates = self._votes.get((name, index))
        return None if candidates is None else _best(candidates)


_BLACK: Grid = np.zeros((1, 1), dtype=np.uint8)


def _best(candidates: Mapping[_Key, _Candidate]) -> Attempts:
    ordered = sorted(candidates.values(), key=lambda candidate: candidate.rank, reverse=True)
    if not ordered:
        raise ValueError("there are no predictions to vote on")
    return ordered[0].grid, ordered[min(1, len(ordered) - 1)].grid


def _key(grid: Grid) -> _Key:
    return len(grid), grid.tobytes()


def _is_right(attempts: Attempts | None, answer: Grid) -> bool:
    return attempts is not None and any(_key(grid) == _key(answer) for grid in attempts)
