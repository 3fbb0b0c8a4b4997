"""Tests of Sudoku: the rules, the solver, the generator, and equivalent puzzles."""

from __future__ import annotations

import random
import time
from itertools import islice, permutations

import numpy as np
import pytest
import torch

from llm_trm.data.puzzles.sudoku import (
    SHAPES,
    Grid,
    Shape,
    canonical,
    count_solutions,
    dig,
    full_grid,
    generate,
    grid_fault,
    grid_tokens,
    identity,
    solution_fault,
    solutions,
    solve,
    symmetries,
    tokens_grid,
    valid_solution,
)
from llm_trm.data.puzzles.sudoku_splits import generated_splits
from llm_trm.errors import InputError

FULL_4 = (1, 2, 3, 4, 3, 4, 1, 2, 2, 1, 4, 3, 4, 3, 2, 1)
# Arto Inkala's puzzle of 2012, known as one of the hardest.
HARD_9 = "8..........36......7..9.2...5...7.......457.....1...3...1....68..85...1..9....4.."
HARD_9_SOLVED = "812753649943682175675491283154237896369845721287169534521974368438526917796318452"


def digits(text: str) -> Grid:
    return tuple(int(cell) for cell in text.replace(".", "0"))


def with_cells(grid: Grid, cells: dict[int, int]) -> Grid:
    return tuple(cells.get(cell, digit) for cell, digit in enumerate(grid))


def brute_force_count(grid: Grid) -> int:
    """Number of solutions of a 4x4 grid, by trying all permutations as rows."""

    def fits(rows: list[tuple[int, ...]]) -> bool:
        columns = list(zip(*rows, strict=True))
        boxes = [rows[top][left : left + 2] for top in range(len(rows)) for left in (0, 2)]
        pairs = [boxes[i] + boxes[i + 2] for i in range(len(boxes) - 2) if i % 4 < 2]
        return all(len(set(unit)) == len(unit) for unit in columns + pairs)

    partial: list[list[tuple[int, ...]]] = [[]]
    for row in range(4):
        clues = grid[4 * row : 4 * row + 4]
        fitting = [p for p in permutations((1, 2, 3, 4)) if all(c in (0, d) for c, d in zip(clues, p))]  # noqa: B905
        partial = [[*rows, p] for rows in partial for p in fitting if fits([*rows, p])]
    return len(partial)


def test_there_are_288_grids_of_4x4_in_two_kinds() -> None:
    grids = set(solutions((0,) * 16))
    assert len(grids) == 288 == brute_force_count((0,) * 16)
    assert all(solution_fault((0,) * 16, grid, SHAPES[4]) is None for grid in grids)
    assert len({canonical(grid, SHAPES[4]) for grid in grids}) == 2


def test_counts_agree_with_brute_force() -> None:
    rng = random.Random(0)
    counts = set()
    for _ in range(60):
        grid = full_grid(SHAPES[4], rng)
        puzzle = with_cells(grid, dict.fromkeys(rng.sample(range(16), rng.randint(9, 13)), 0))
        expected = brute_force_count(puzzle)
        assert count_solutions(puzzle, limit=1000) == expected
        assert count_solutions(puzzle) == min(expected, 2)
        counts.add(min(expected, 2))
    assert counts == {1, 2}


@pytest.mark.parametrize("size", [6, 9])
def test_whatever_is_found_is_a_solution(size: int) -> None:
    """Random clues within the rules; most of these puzzles have no solution."""
    shape = SHAPES[size]
    rng = random.Random(0)
    solved = 0
    for _ in range(60):
        puzzle: Grid = (0,) * shape.cells
        for cell in rng.sample(range(shape.cells), shape.cells // 4):
            tried = with_cells(puzzle, {cell: rng.randint(1, size)})
            if grid_fault(tried, shape) is None:
                puzzle = tried
        for solution in islice(solutions(puzzle), 3):
            assert solution_fault(puzzle, solution, shape) is None
            solved += 1
    assert solved


def test_a_hard_puzzle_is_solved_quickly() -> None:
    puzzle = digits(HARD_9)
    start = time.process_time()
    assert solve(puzzle) == digits(HARD_9_SOLVED)
    assert count_solutions(puzzle) == 1
    # About 20 ms on an idle core.
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    "puzzle",
    [
        (1, 1, *(0,) * 14),  # Breaks a rule.
        (1, 2, 3, 0, 0, 0, 0, 4, *(0,) * 8),  # No digit is left for cell (1, 4).
        (5, *(0,) * 15),
    ],
)
def test_a_puzzle_without_a_solution(puzzle: Grid) -> None:
    assert solve(puzzle) is None
    assert count_solutions(puzzle) == 0


def test_grid_of_unknown_size_is_rejected() -> None:
    with pytest.raises(InputError, match="25 cells is not a Sudoku"):
        solve((0,) * 25)


@pytest.mark.parametrize(
    "cells, fault",
    [
        ({0: 2, 1: 1}, "column 1 contains 2 twice"),
        ({1: 1}, "row 1 contains 1 twice"),
        ({7: 0}, "cell (2, 4) is blank"),
        ({7: 5}, "cell (2, 4) is 5, which is not a digit from 1 to 4"),
    ],
)
def test_descriptions_of_faults(cells: dict[int, int], fault: str) -> None:
    blank = (0,) * 16
    assert solution_fault(blank, with_cells(FULL_4, cells), SHAPES[4]) == fault


def test_more_descriptions_of_faults() -> None:
    blank = (0,) * 16
    shape = SHAPES[4]
    # All rows and columns of a cyclic square are valid, but its boxes are not.
    cyclic = (1, 2, 3, 4, 2, 3, 4, 1, 3, 4, 1, 2, 4, 1, 2, 3)
    assert solution_fault(blank, cyclic, shape) == "box 1 contains 2 twice"
    clue = with_cells(blank, {7: 3})
    assert solution_fault(clue, FULL_4, shape) == "cell (2, 4) contradicts its clue"
    assert solution_fault(blank, FULL_4[:-1], shape) == "the solution has 15 cells instead of 16"
    assert solution_fault(FULL_4, FULL_4, shape) is None
    assert valid_solution(blank, FULL_4)
    assert not valid_solution(clue, FULL_4)


def test_boxes_of_6x6_have_two_rows_and_three_columns() -> None:
    grid = full_grid(SHAPES[6], random.Random(0))
    square = np.array(grid).reshape(6, 6)
    for top in range(0, 6, 2):
        for left in range(0, 6, 3):
            assert set(square[top : top + 2, left : left + 3].flat) == set(range(1, 7))


@pytest.mark.parametrize(
    ("shape", "clues"), [(SHAPES[4], (4, 9)), (SHAPES[6], (10, 14)), (SHAPES[9], (26, 34))]
)
def test_generated_puzzles(shape: Shape, clues: tuple[int, int]) -> None:
    made = list(generate(shape, 12, clues, seed=3))
    assert made == list(generate(shape, 12, clues, seed=3))
    assert made != list(generate(shape, 12, clues, seed=4))
    assert len({identity(puzzle, shape) for puzzle, _ in made}) == 12
    for puzzle, solution in made:
        assert solution_fault(puzzle, solution, shape) is None
        assert count_solutions(puzzle) == 1
        assert clues[0] <= sum(map(bool, puzzle)) <= clues[1]


def test_no_clue_of_a_minimal_puzzle_can_be_removed() -> None:
    for puzzle, _ in generate(SHAPES[6], 5, None, seed=0):
        for cell in range(36):
            if puzzle[cell]:
                assert count_solutions(with_cells(puzzle, {cell: 0})) == 2


def test_digging_stops_at_the_wanted_number() -> None:
    grid = full_grid(SHAPES[9], random.Random(0))
    puzzle = dig(grid, 40, random.Random(0))
    assert sum(map(bool, puzzle)) == 40
    assert all(clue in (0, digit) for clue, digit in zip(puzzle, grid, strict=True))


@pytest.mark.parametrize(
    "clues, number, words",
    [
        # There are 13 different 4x4 puzzles with four clues, and 36 minimal ones.
        ((4, 4), 13, "found only 13 of 14 different 4x4 puzzles with 4 to 4 clues"),
        (None, 36, "found only 36 of 37 different 4x4 puzzles with minimal clues"),
    ],
)
def test_too_many_puzzles_are_rejected(
    monkeypatch: pytest.MonkeyPatch, clues: tuple[int, int] | None, number: int, words: str
) -> None:
    monkeypatch.setattr("llm_trm.data.puzzles.sudoku._MAX_FAILURES", 300)
    with pytest.raises(InputError, match=f"{words}.*: use fewer"):
        list(generate(SHAPES[4], number + 1, clues, seed=0))


@pytest.mark.parametrize(("size", "number"), [(4, 128), (6, 3456)])
def test_the_number_of_symmetries(size: int, number: int) -> None:
    orders = symmetries(SHAPES[size])
    assert orders.shape == (number, size * size)
    assert len(np.unique(orders, axis=0)) == number
    assert (np.sort(orders, axis=1) == np.arange(size * size)).all()


@pytest.mark.parametrize("size", [4, 6])
def test_equivalent_puzzles_and_only_these_have_one_form(size: int) -> None:
    shape = SHAPES[size]
    rng = np.random.default_rng(0)
    orders = symmetries(shape)
    forms = []
    for puzzle, _ in generate(shape, 8, (size, 2 * size), seed=1):
        form = canonical(puzzle, shape)
        forms.append(form)
        assert canonical(form, shape) == form
        for _ in range(10):
            labels = np.concatenate([[0], 1 + rng.permutation(size)])
            image = labels[np.array(puzzle)[rng.choice(orders)]]
            assert canonical(image.tolist(), shape) == form
        clue = next(cell for cell, digit in enumerate(puzzle) if digit)
        assert canonical(with_cells(puzzle, {clue: 0}), shape) != form
    assert len(set(forms)) == 8


def test_9x9_puzzles_are_the_same_if_equal() -> None:
    puzzle = digits(HARD_9)
    assert identity(puzzle, SHAPES[9]) == puzzle
    with pytest.raises(ValueError, match="too many symmetries"):
        canonical(puzzle, SHAPES[9])


def test_tokens_and_back() -> None:
    puzzle = digits(HARD_9)
    tokens = grid_tokens(puzzle)
    assert tokens.dtype == np.uint8
    assert (tokens[0], tokens[1]) == (9, 1)
    assert tokens_grid(torch.from_numpy(tokens)) == puzzle
    assert tokens_grid([0, 1, 2]) == (0, 0, 1)


def test_no_held_out_puzzle_is_equivalent_to_a_training_puzzle() -> None:
    splits = generated_splits(SHAPES[4], 150, 60, (4, 8), seed=0)
    forms = {
        name: {canonical(tokens_grid(puzzle), SHAPES[4]) for puzzle in split.inputs.tolist()}
        for name, split in splits.items()
    }
    assert (len(forms["train"]), len(forms["test"])) == (150, 60)
    assert not forms["train"] & forms["test"]
