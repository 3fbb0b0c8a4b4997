"""Training and held-out Sudokus that have nothing in common."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llm_trm.data.puzzles.dataset import PuzzleInfo, PuzzleSplit
from llm_trm.data.puzzles.sudoku import Grid, Shape, generate, grid_tokens, identity
from llm_trm.data.puzzles.sudoku_rows import Progress, SudokuRows, untracked, verified
from llm_trm.errors import InputError
from llm_trm.memory import require_memory


def generated_splits(
    shape: Shape,
    train: int,
    test: int,
    clues: tuple[int, int] | None,
    seed: int,
    progress: Progress = untracked,
) -> dict[str, PuzzleSplit]:
    """``train`` and ``test`` puzzles made by :func:`~llm_trm.data.puzzles.sudoku.generate`, all different.

    ``progress`` shows how far it is.

    Raises:
        InputError: There are not so many.
    """
    # Two grids and the form that all like it share, as tuples of pointers.
    require_memory(3 * 8 * shape.cells * (train + test), f"{train + test:,} Sudokus", "ask for fewer puzzles")
    pairs = np.array(list(progress(generate(shape, train + test, clues, seed), train + test)), dtype=np.uint8)
    # Where puzzles run short, the last to be found are the rare ones: held-out puzzles come from everywhere.
    pairs = pairs[np.random.default_rng(seed).permutation(len(pairs))]
    return {
        "train": sudoku_split(pairs[test:, 0], pairs[test:, 1]),
        "test": sudoku_split(pairs[:test, 0], pairs[:test, 1]),
    }


def held_out_splits(
    rows: SudokuRows,
    test_rows: SudokuRows | None,
    *,
    train: int | None,
    test: int | None,
    fraction: float,
    seed: int,
    trust: bool,
    progress: Progress = untracked,
) -> dict[str, PuzzleSplit]:
    """``train`` and ``test`` puzzles that were read and pass every check; no held-out one is a training one.

    Nor does it become one by a symmetry, as far as :func:`~llm_trm.data.puzzles.sudoku.identity` knows.

    Args:
        rows: Puzzles to train on, and to hold out where there is no test split.
        test_rows: The test split.
        train: How many to train on at most; None for all.
        test: How many to hold out; None for all of ``test_rows``, or ``fraction`` of ``rows``.
        fraction: See ``test``.
        seed: Same seed, same puzzles.
        trust: See :func:`~llm_trm.data.puzzles.sudoku_rows.verified`.
        progress: Shows how far it is.

    Raises:
        InputError: A row is at fault, or a split is left empty.
    """
    source = rows if test_rows is None else test_rows
    if source.shape != rows.shape:
        raise InputError(f"{source.source} and {rows.source} hold grids of different sizes: name another")
    if test is None and test_rows is None:
        test = max(1, round(len(rows) * fraction))
    held_out: set[Grid] = set()
    tested = source.take(draw(source.puzzles, rows.shape, test, seed, held_out, distinct=True))
    trained = rows.take(draw(rows.puzzles, rows.shape, train, seed + 1, held_out))
    splits = {"train": trained, "test": tested}
    for name, wanted in (("test", test), ("train", train)):
        if len(splits[name]) < (wanted or 1):
            raise InputError(
                f"{len(splits[name])} puzzles are left for the split {name}, of {wanted or 1} wanted; those "
                "equivalent to a held-out one do not count: give more, or ask for fewer"
            )
    checked = {name: verified(part, trust=trust, progress=progress) for name, part in splits.items()}
    return {name: sudoku_split(part.puzzles, part.solutions) for name, part in checked.items()}


def draw(
    grids: npt.NDArray[np.uint8],
    shape: Shape,
    count: int | None,
    seed: int,
    excluded: set[Grid],
    *,
    distinct: bool = False,
) -> npt.NDArray[np.intp]:
    """Indices of ``count`` puzzles of grids [N, L] drawn at random, in order; fewer where there are fewer.

    Args:
        grids: Puzzles.
        shape: Theirs.
        count: How many; None takes all.
        seed: Same seed, same puzzles.
        excluded: Forms (:func:`~llm_trm.data.puzzles.sudoku.identity`) of puzzles to leave out.
        distinct: Leave out repetitions too, and add the forms of what is drawn to ``excluded``.
    """
    order = np.random.default_rng(seed).permutation(len(grids))
    if not excluded and not distinct:
        return np.sort(order[:count])
    taken: list[int] = []
    for index in order.tolist():
        if len(taken) == count:
            break
        form = identity(tuple(grids[index].tolist()), shape)
        if form in excluded:
            continue
        if distinct:
            excluded.add(form)
        taken.append(index)
    return np.sort(np.array(taken, dtype=np.intp))


def sudoku_split(puzzles: npt.NDArray[np.uint8], solutions: npt.NDArray[np.uint8]) -> PuzzleSplit:
    """A split of puzzles and solutions [N, L]; all have the puzzle identifier 0."""
    return PuzzleSplit(
        torch.from_numpy(grid_tokens(puzzles)),
        torch.from_numpy(grid_tokens(solutions)),
        torch.zeros(len(puzzles), dtype=torch.int32),
    )


def sudoku_info(shape: Shape, facts: dict[str, Any]) -> PuzzleInfo:
    """What Sudokus of ``shape`` share."""
    return PuzzleInfo("sudoku", shape.size, shape.size, shape.vocab_size, facts=facts)
