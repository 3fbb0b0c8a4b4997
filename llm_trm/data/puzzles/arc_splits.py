"""Turns ARC tasks into puzzles for training: augments, numbers and encodes them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from llm_trm.data.puzzles.arc import COLOURS, DIHEDRAL, SIDE, ArcTask, Pair, Transform, encode
from llm_trm.data.puzzles.dataset import PuzzleSplit

#: Maximum number of attempts per augmentation. Tasks with few colours have few distinct augmentations.
_DRAWS = 5

Progress = Callable[[int], None]


@dataclass(frozen=True)
class ArcPlan:
    """Assignment of tasks and pairs to splits.

    Attributes:
        held_out: Tasks whose test pairs are the test split; their other pairs are training data.
        learned: Tasks whose pairs with an answer are all training data.
        transforms: Symmetries for each task, ``held_out`` before ``learned``, starting with the identity.
            Each has its own puzzle identifier, counted from 1 in this order.
        seed: Seed of the translations.
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
        """Number of puzzle identifiers, including the blank one, 0."""
        return 1 + sum(map(len, self.transforms))

    @property
    def sizes(self) -> dict[str, int]:
        """Number of pairs in each split."""
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
        """The splits ``train`` and ``test``.

        Training pairs are translated at random, except one pair of each puzzle; test pairs are in the upper
        left corner. Labels of unknown answers are 0, which losses ignore.

        Args:
            progress: Called with the number of pairs written since the last call.
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
            # Sample all corners at once: one call for each would take longer than the encoding.
            draws = random.random((len(group), len(pairs), 2)).tolist()
            kept = random.integers(max(1, len(pairs)), size=len(group)).tolist()
            for transform, offsets, still in zip(group, draws, kept, strict=True):
                for index, (pair, offset) in enumerate(zip(pairs, offsets, strict=True), written):
                    moves = translate and index - written != still
                    corner = _corner(pair, transform, *offset) if moves else (0, 0)
                    encode(transform.apply(pair.input), canvases[0, index], *corner)
                    if pair.output is not None:
                        encode(transform.apply(pair.output), canvases[1, index], *corner)
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
    """Sample up to ``augment`` symmetries of each task, all of which yield different tasks.

    A task's symmetries depend only on its name, its pairs, ``augment`` and ``seed``. Colour 0, black, is
    kept.

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
    # Sort, because the order of pairs does not matter.
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
