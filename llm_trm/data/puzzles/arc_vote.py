"""Two attempts for each ARC test, voted from the predictions under all symmetries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llm_trm.data.puzzles.arc import Grid, crop, invert
from llm_trm.data.puzzles.arc_folder import ArcKey

#: Two grids that may be equal.
Attempts = tuple[Grid, Grid]

#: Rows and bytes of a grid: what makes it equal to another.
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
    """How many tests are solved.

    Attributes:
        inputs: Share of the test inputs where one of the two attempts is right.
        tasks: Mean over tasks of that share within a task: the figure that is published.
        scored: Test inputs with a known answer; the others count for nothing.
    """

    inputs: float
    tasks: float
    scored: int


def vote(predictions: Sequence[tuple[Grid, float]]) -> Attempts:
    """The two grids that most predictions agree on; where as many do, those with the higher mean probability.

    What is still equal is ordered as it came. Where there is one candidate, both attempts are that.

    Args:
        predictions: Grids, brought back to the task's own colours and orientation, and halting probabilities.

    Raises:
        ValueError: There are no predictions.
    """
    candidates: dict[_Key, _Candidate] = {}
    for grid, probability in predictions:
        candidates.setdefault(_key(grid), _Candidate(grid)).add(probability)
    return _best(candidates)


def score(attempts: Sequence[Attempts | None], answers: Sequence[Grid]) -> float:
    """The share of ``answers`` that one of the two attempts equals; None, for no attempts, equals nothing."""
    right = [_is_right(pair, answer) for pair, answer in zip(attempts, answers, strict=True)]
    return sum(right) / len(right)


class ArcBallot:
    """Collects the predictions for a folder's test split, batch by batch and in any order.

    Args:
        key: Of the folder.
    """

    def __init__(self, key: ArcKey) -> None:
        self._key = key
        self._places: dict[str, dict[_Key, list[int]]] = {}
        for name, pairs in key.tests.items():
            places = self._places[name] = {}
            for place, pair in enumerate(pairs):
                places.setdefault(_key(pair.input), []).append(place)
        self._votes: dict[tuple[str, int], dict[_Key, _Candidate]] = {}

    def add(
        self,
        inputs: NDArray[np.integer],
        predictions: NDArray[np.integer],
        puzzles: NDArray[np.integer],
        probabilities: NDArray[np.floating],
    ) -> None:
        """Count a batch; rows with the blank identifier are padding and left out.

        Args:
            inputs, predictions: Tokens, [B, 900].
            puzzles: Identifiers, [B].
            probabilities: Of halting, [B].

        Raises:
            ValueError: A question is none of its task's test inputs.
        """
        rows = zip(puzzles.tolist(), crop(inputs), crop(predictions), probabilities.tolist(), strict=True)
        for number, question, prediction, probability in rows:
            if (entry := self._key.identifiers[number]) is None:
                continue
            name, transform = entry
            places = self._places.get(name, {}).get(_key(invert(question, transform)))
            if places is None:
                raise ValueError(f"puzzle {number} asks what is no test input of task {name}")
            grid = invert(prediction, transform)
            for place in places:
                candidates = self._votes.setdefault((name, place), {})
                candidates.setdefault(_key(grid), _Candidate(grid)).add(probability)

    def attempts(self) -> dict[str, list[Attempts | None]]:
        """Two attempts for each test input of each held-out task; None where nothing was predicted."""
        return {
            name: [self._attempts(name, place) for place in range(len(pairs))]
            for name, pairs in self._key.tests.items()
        }

    def score(self) -> ArcScore | None:
        """How many tests are solved; None where no answer is known."""
        shares, solved, scored = [], 0.0, 0
        for name, pairs in self._key.tests.items():
            known = [(place, pair.output) for place, pair in enumerate(pairs) if pair.output is not None]
            if known:
                tried = [self._attempts(name, place) for place, _ in known]
                shares.append(score(tried, [answer for _, answer in known]))
                solved += shares[-1] * len(known)
                scored += len(known)
        return ArcScore(solved / scored, sum(shares) / len(shares), scored) if scored else None

    def submission(self) -> dict[str, list[dict[str, list[list[int]]]]]:
        """The attempts as the ARC Prize takes them; an input without a prediction gets [[0]] twice."""
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

    def _attempts(self, name: str, place: int) -> Attempts | None:
        candidates = self._votes.get((name, place))
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
