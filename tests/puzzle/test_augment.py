"""Tests that augmented puzzles are valid, and that every symmetry occurs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llm_trm.data.puzzles.augment import augmentation
from llm_trm.data.puzzles.dataset import PuzzleInfo
from llm_trm.data.puzzles.sudoku import (
    SHAPES,
    canonical,
    count_solutions,
    generate,
    grid_tokens,
    solution_fault,
    symmetries,
    tokens_grid,
)
from llm_trm.errors import InputError

CLUES = {4: (4, 8), 6: (10, 16), 9: (26, 34)}


def info_of(size: int) -> PuzzleInfo:
    return PuzzleInfo("sudoku", size, size, size + 2)


def puzzles_of(size: int, count: int) -> tuple[Tensor, Tensor]:
    pairs = np.array(list(generate(SHAPES[size], count, CLUES[size], seed=0)))
    tokens = torch.from_numpy(grid_tokens(pairs))
    return tokens[:, 0], tokens[:, 1]


@pytest.mark.parametrize("size", [4, 6, 9])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_augmented_puzzles_keep_to_the_rules(size: int, dtype: torch.dtype, device: str) -> None:
    shape = SHAPES[size]
    augment = augmentation(info_of(size))
    assert augment is not None
    torch.manual_seed(0)
    inputs, labels = (tokens.repeat(10, 1).to(device, dtype) for tokens in puzzles_of(size, 5))
    before = inputs.clone(), labels.clone()
    new_inputs, new_labels = augment(inputs, labels)
    assert torch.equal(inputs, before[0]) and torch.equal(labels, before[1])
    assert new_inputs.dtype == new_labels.dtype == dtype
    assert new_inputs.device == inputs.device
    assert not torch.equal(new_inputs, inputs)
    for puzzle, solution, old in zip(new_inputs.tolist(), new_labels.tolist(), inputs.tolist(), strict=True):
        # Clues that contradict the solution would be a fault, since both get the same symmetry.
        assert solution_fault(tokens_grid(puzzle), tokens_grid(solution), shape) is None
        assert puzzle.count(1) == old.count(1)
        if size == 4:
            assert count_solutions(tokens_grid(puzzle)) == 1
        if size != 9:
            assert canonical(tokens_grid(puzzle), shape) == canonical(tokens_grid(old), shape)


def deviation(counts: Counter[Any]) -> float:
    """Pearson's chi-squared divided by its degrees of freedom: about 1 for a uniform distribution."""
    expected = counts.total() / len(counts)
    return sum((count - expected) ** 2 for count in counts.values()) / expected / (len(counts) - 1)


@pytest.mark.parametrize("size", [4, 6])
def test_every_spatial_symmetry_is_as_likely(size: int) -> None:
    shape = SHAPES[size]
    augment = augmentation(info_of(size))
    assert augment is not None
    draws = 20 * len(symmetries(shape))
    # Digits are relabelled and blanks are not. One batch per bit of the cell indices, encoded as digits and
    # blanks, shows where each cell goes, since the same seed gives the same symmetries.
    cells = torch.arange(shape.cells)
    arrangements = torch.zeros(draws, shape.cells, dtype=torch.uint8)
    for bit in range((shape.cells - 1).bit_length()):
        torch.manual_seed(1)
        tokens = (1 + (cells >> bit & 1)).expand(draws, -1)
        moved, same = augment(tokens, tokens)
        assert torch.equal(moved, same)
        arrangements += (moved > 1).to(torch.uint8) << bit
    counts = Counter(row.tobytes() for row in arrangements.numpy())
    assert set(counts) == {row.tobytes() for row in symmetries(shape).astype(np.uint8)}
    assert deviation(counts) < 1.5


def test_every_relabelling_of_4x4_is_as_likely() -> None:
    augment = augmentation(info_of(4))
    assert augment is not None
    labels = []
    for token in range(2, 6):
        torch.manual_seed(1)
        tokens = torch.full((2400, 16), token, dtype=torch.uint8)
        labels.append(augment(tokens, tokens)[0][:, 0])
    counts = Counter(map(tuple, torch.stack(labels, 1).tolist()))
    assert set(counts) == set(permutations(range(2, 6)))
    assert deviation(counts) < 2


def test_padding_and_blanks_stay() -> None:
    augment = augmentation(info_of(6))
    assert augment is not None
    padding = torch.zeros(8, 36, dtype=torch.uint8)
    blank, ignored = augment(padding + 1, padding)
    assert torch.equal(blank, padding + 1)
    assert torch.equal(ignored, padding)


def test_samples_of_a_batch_get_symmetries_of_their_own() -> None:
    augment = augmentation(info_of(9))
    assert augment is not None
    inputs, labels = (tokens.repeat(32, 1) for tokens in puzzles_of(9, 1))
    torch.manual_seed(0)
    new, _ = augment(inputs, labels)
    assert len(torch.unique(new, dim=0)) == 32


def test_the_generator_of_torch_decides() -> None:
    augment = augmentation(info_of(6))
    assert augment is not None
    inputs, labels = puzzles_of(6, 4)
    torch.manual_seed(5)
    first = augment(inputs, labels)[0]
    assert not torch.equal(augment(inputs, labels)[0], first)
    torch.manual_seed(5)
    assert torch.equal(augment(inputs, labels)[0], first)


def waits(call: Callable[[], object]) -> set[str]:
    """The operations of a call whose result or shape depends on values on a device."""
    with torch.autograd.profiler.profile() as profile:
        call()
    return {event.name for event in profile.function_events} & {
        "aten::_local_scalar_dense",
        "aten::nonzero",
        "aten::masked_select",
        "aten::equal",
    }


@pytest.mark.parametrize("info", [info_of(4), info_of(9), PuzzleInfo("maze", 30, 30, 6)])
def test_does_not_synchronise_with_the_device(info: PuzzleInfo) -> None:
    augment = augmentation(info)
    assert augment is not None
    tokens = torch.ones(7, info.seq_len, dtype=torch.uint8)
    assert waits(lambda: tokens[0, 0].item()) == {"aten::_local_scalar_dense"}
    assert waits(lambda: tokens[tokens > 1]) == {"aten::nonzero"}
    assert waits(lambda: augment(tokens, tokens)) == set()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("info", [info_of(9), PuzzleInfo("maze", 30, 30, 6)])
def test_no_synchronisation_on_cuda(info: PuzzleInfo) -> None:
    augment = augmentation(info)
    assert augment is not None
    tokens = torch.ones(7, info.seq_len, dtype=torch.uint8, device="cuda")
    augment(tokens, tokens)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        augment(tokens, tokens)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def test_mazes_are_turned_and_flipped() -> None:
    augment = augmentation(PuzzleInfo("maze", 3, 3, 6))
    assert augment is not None
    torch.manual_seed(0)
    maze = torch.arange(9)
    new, labels = augment(maze.expand(400, -1), 2 * maze.expand(400, -1))
    assert torch.equal(labels, 2 * new)
    square = maze.numpy().reshape(3, 3)
    images = {tuple(np.rot90(flipped, turns).flat) for flipped in (square, square.T) for turns in range(4)}
    counts = Counter(map(tuple, new.tolist()))
    assert set(counts) == images
    assert len(images) == 8 and min(counts.values()) > 25


def test_non_square_maze_keeps_its_shape() -> None:
    augment = augmentation(PuzzleInfo("maze", 2, 3, 6))
    assert augment is not None
    torch.manual_seed(0)
    new, _ = augment(torch.arange(6).expand(100, -1), torch.arange(6).expand(100, -1))
    square = np.arange(6).reshape(2, 3)
    expected = {tuple(grid.flat) for grid in (square, square[::-1], square[:, ::-1], square[::-1, ::-1])}
    assert set(map(tuple, new.tolist())) == expected


def test_arc_has_none_and_unknown_sudokus_are_refused() -> None:
    assert augmentation(PuzzleInfo("arc", 30, 30, 12)) is None
    for info in (PuzzleInfo("sudoku", 16, 16, 18), PuzzleInfo("sudoku", 9, 9, 10)):
        with pytest.raises(InputError, match="are not Sudokus"):
            augmentation(info)
