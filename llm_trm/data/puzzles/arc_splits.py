"""ARC tasks as puzzles to learn from: augmented, numbered and encoded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from llm_trm.data.puzzles.arc import COLOURS, DIHEDRAL, SIDE, ArcTask, Pair, Transform, encode
from llm_trm.data.puzzles.dataset import PuzzleSplit

#: Draws for each augmentation that is wanted, before a task is left with fewer: many tasks have few colours.
_DRAWS = 5

Progress = Callable[[int], None]


@dataclass(frozen=True)
class ArcPlan:
    """Which pairs of which tasks go where.

    Attributes:
        held_out: Tasks whose test pairs are the test split; their other pairs are learned from.
        learned: Tasks of which all pairs with an answer are learned from.
        transforms: For each task, ``held_out`` before ``learned``, the symmetries that it is learned under:
            the identity first, each with a puzzle identifier of its own, counted from 1 in this order.
        seed: Of the translations.
    """

    held_out: tuple[ArcTask, ...]
    learned: tuple[ArcTask, ...]
    transforms: tuple[tuple[Transform, ...], ...]
    seed: int

    @property
    def tasks(self) -> tuple[ArcTask, ...]:
        """All tasks, in the order of their identifiers."""
        return self.held_out + self.learned

    @property
    def num_puzzles(self) -> int:
        """Puzzle identifiers, with the blank one, 0."""
        return 1 + sum(map(len, self.transforms))

    @property
    def sizes(self) -> dict[str, int]:
        """Pairs of the two splits."""
        return {
            name: sum(len(pairs) * len(group) for pairs, group in zip(parts, self.transforms, strict=False))
            for name, parts in (("train", self._learned_pairs()), ("test", self._tested_pairs()))
        }

    def identifiers(self) -> list[tuple[str, Transform] | None]:
        """The task and the symmetry of each puzzle identifier; None for the blank one."""
        numbered: list[tuple[str, Transform] | None] = [None]
        for task, group in zip(self.tasks, self.transforms, strict=True):
            numbered += [(task.name, transform) for transform in group]
        return numbered

    def splits(self, progress: Progress | None = None) -> dict[str, PuzzleSplit]:
        """``train``, moved at random but for one pair of each puzzle, and ``test``, in the upper left corner.

        Labels are 0, and so count for nothing, where an answer is unknown.

        Args:
            progress: Called with the pairs written since the last call.
        """
        sizes = self.sizes
        return {
            "train": self._split(self._learned_pairs(), sizes["train"], True, progress),
            "test": self._split(self._tested_pairs(), sizes["test"], False, progress),
        }

    def _learned_pairs(self) -> list[list[Pair]]:
        known = [
            [pair for pair in task.train + task.test if pair.output is not None] for task in self.learned
        ]
        return [list(task.train) for task in self.held_out] + known

    def _tested_pairs(self) -> list[list[Pair]]:
        return [list(task.test) for task in self.held_out]

    def _split(
        self, parts: list[list[Pair]], size: int, translate: bool, progress: Progress | None
    ) -> PuzzleSplit:
        tensors = torch.zeros(2, size, SIDE * SIDE, dtype=torch.uint8)
        puzzles = torch.empty(size, dtype=torch.int32)
        canvases, numbers = tensors.numpy().reshape(2, size, SIDE, SIDE), puzzles.numpy()
        written, identifier = 0, 1
        for task, pairs, group in zip(self.tasks, parts, self.transforms, strict=False):
            random = _stream(self.seed, task.name, "translation")
            # At once: a draw of its own for each corner would take longer than the encoding.
            draws = random.random((len(group), len(pairs), 2)).tolist()
            kept = random.integers(max(1, len(pairs)), size=len(group)).tolist()
            for transform, shares, still in zip(group, draws, kept, strict=True):
                for place, (pair, share) in enumerate(zip(pairs, shares, strict=True), written):
                    moves = translate and place - written != still
                    corner = _corner(pair, transform, *share) if moves else (0, 0)
                    encode(transform.apply(pair.input), canvases[0, place], *corner)
                    if pair.output is not None:
                        encode(transform.apply(pair.output), canvases[1, place], *corner)
                numbers[written : written + len(pairs)] = identifier
                written += len(pairs)
                identifier += 1
            if progress is not None:
                progress(len(pairs) * len(group))
        return PuzzleSplit(tensors[0], tensors[1], puzzles)


def plan_tasks(
    held_out: Sequence[ArcTask],
    learned: Sequence[ArcTask],
    augment: int,
    seed: int,
    progress: Progress | None = None,
) -> ArcPlan:
    """Draw up to ``augment`` symmetries of each task, all of which give different tasks.

    A task's symmetries depend on its name, its pairs, ``augment`` and ``seed`` alone. Black, colour 0, stays.

    Args:
        progress: Called with 1 after every task.
    """
    groups = []
    for task in (*held_out, *learned):
        groups.append(_transforms(task, augment, _stream(seed, task.name, "symmetries")))
        if progress is not None:
            progress(1)
    return ArcPlan(tuple(held_out), tuple(learned), tuple(groups), seed)


def _transforms(task: ArcTask, augment: int, random: np.random.Generator) -> tuple[Transform, ...]:
    group = [Transform()]
    seen = {_digest(task, group[0])}
    for _ in range(_DRAWS * augment):
        if len(group) > augment:
            break
        colours = (0, *(1 + random.permutation(COLOURS - 1)).tolist())
        transform = Transform(int(random.integers(DIHEDRAL)), colours)
        if (digest := _digest(task, transform)) not in seen:
            seen.add(digest)
            group.append(transform)
    return tuple(group)


def _digest(task: ArcTask, transform: Transform) -> bytes:
    # The order of pairs makes no other task.
    pairs = sorted(
        b"".join(_bytes(transform.apply(grid)) for grid in (pair.input, pair.output) if grid is not None)
        for pair in task.train + task.test
    )
    return hashlib.blake2b(b"".join(pairs), digest_size=16).digest()


def _bytes(grid: NDArray[np.uint8]) -> bytes:
    return bytes(grid.shape) + grid.tobytes()


def _corner(pair: Pair, transform: Transform, down: float, right: float) -> tuple[int, int]:
    output = pair.input if pair.output is None else pair.output
    rows, columns = (max(sides) for sides in zip(pair.input.shape, output.shape, strict=True))
    if transform.swaps_sides:
        rows, columns = columns, rows
    return int(down * (SIDE - rows + 1)), int(right * (SIDE - columns + 1))


def _stream(seed: int, name: str, purpose: str) -> np.random.Generator:
    text = f"{seed} {name} {purpose}"
    return np.random.default_rng(
        int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "big")
    )
