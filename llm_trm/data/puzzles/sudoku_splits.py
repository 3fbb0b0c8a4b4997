"""Disjoint training and held-out splits of Sudokus."""

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
    """Distinct ``train`` and ``test`` puzzles from :func:`~llm_trm.data.puzzles.sudoku.generate`.

    Raises:
        InputError: There are too few such puzzles.
    """
    # Two grids and the canonical form, as tuples of pointers.
    require_memory(3 * 8 * shape.cells * (train + test), f"{train + test:,} Sudokus", "use fewer puzzles")
    pairs = np.array(list(progress(generate(shape, train + test, clues, seed), train + test)), dtype=np.uint8)
    # If puzzles are scarce, rare ones are found last. Shuffle, so that held-out puzzles are representative.
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
    """Disjoint ``train`` and ``test`` puzzles that pass all checks.

    No held-out puzzle is equivalent to a training puzzle, as far as
    :func:`~llm_trm.data.puzzles.sudoku.identity` can tell.

    Args:
        rows: Puzzles to train on, and to hold out if there is no test split.
        test_rows: The test split.
        train: Maximum number of training puzzles; None for all.
        test: Number of held-out puzzles; None for all of ``test_rows``, or ``fraction`` of ``rows``.
        fraction: See ``test``.
        seed: Random seed.
        trust: See :func:`~llm_trm.data.puzzles.sudoku_rows.verified`.
        progress: Shows progress.

    Raises:
        InputError: A row is invalid, or a split is too small.
    """
    source = rows if test_rows is None else test_rows
    if source.shape != rows.shape:
        raise InputError(
            f"{source.source} and {rows.source} have grids of different sizes: name sources of one size"
        )
    if test is None and test_rows is None:
        test = max(1, round(len(rows) * fraction))
    held_out: set[Grid] = set()
    tested = source.take(draw(source.puzzles, rows.shape, test, seed, held_out, distinct=True))
    trained = rows.take(draw(rows.puzzles, rows.shape, train, seed + 1, held_out))
    splits = {"train": trained, "test": tested}
    for name, wanted in (("test", test), ("train", train)):
        if len(splits[name]) < (wanted or 1):
            raise InputError(
                f"only {len(splits[name])} puzzles are left for the split {name}, but {wanted or 1} were "
                "requested (puzzles equivalent to held-out ones are excluded): provide more, or request fewer"
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
    """Sorted indices of up to ``count`` random puzzles of grids [N, L].

    Args:
        grids: Puzzles.
        shape: Shape of the puzzles.
        count: Maximum number of puzzles; None for all.
        seed: Random seed.
        excluded: Keys (:func:`~llm_trm.data.puzzles.sudoku.identity`) of puzzles to exclude.
        distinct: Exclude duplicates as well, and add the keys of the drawn puzzles to ``excluded``.
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
    """A split of puzzles and solutions [N, L], all with the puzzle identifier 0."""
    return PuzzleSplit(
        torch.from_numpy(grid_tokens(puzzles)),
        torch.from_numpy(grid_tokens(solutions)),
        torch.zeros(len(puzzles), dtype=torch.int32),
    )


def sudoku_info(shape: Shape, facts: dict[str, Any]) -> PuzzleInfo:
    """Properties of Sudokus with ``shape``."""
    return PuzzleInfo("sudoku", shape.size, shape.size, shape.vocab_size, facts=facts)
