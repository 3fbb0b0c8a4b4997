"""Tests of reading external Sudokus: their formats, and errors."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_trm.data.puzzles.sudoku import SHAPES, Grid, canonical, generate, solution_fault, tokens_grid
from llm_trm.data.puzzles.sudoku_files import read_sudoku_dataset, read_sudoku_file
from llm_trm.data.puzzles.sudoku_rows import verified
from llm_trm.data.puzzles.sudoku_splits import held_out_splits
from llm_trm.errors import InputError

EXPERT = Path(__file__).parents[3] / "shared/data/sudoku_expert.csv"

PUZZLE = "1..2..3..4..3..."
SOLUTION = "1342423124133124"
# Upside down it is an equivalent but different puzzle.
SECOND, SECOND_SOLUTION = PUZZLE[::-1], SOLUTION[::-1]


def text(grid: Grid) -> str:
    return "".join(map(str, grid))


def written(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


def test_a_row_without_a_header(tmp_path: Path) -> None:
    rows = verified(read_sudoku_file(written(tmp_path / "a.csv", f"{PUZZLE},{SOLUTION}\n")))
    assert text(rows.solutions[0]) == SOLUTION


@pytest.mark.parametrize(
    "content",
    [
        f"puzzle,solution\n{PUZZLE},{SOLUTION}\n{SECOND},{SECOND_SOLUTION}\n",
        f"\ufeffPuzzle, Solution\r\n{PUZZLE},{SOLUTION}\r\n\r\n{SECOND},{SECOND_SOLUTION}",
        f"quizzes,solutions\n{PUZZLE.replace('.', '0')},{SOLUTION}\n"
        f"{SECOND.replace('.', '_')},{SECOND_SOLUTION}\n",
        f"source,question,answer,rating\nx,{PUZZLE},{SOLUTION},3\ny,{SECOND},{SECOND_SOLUTION},7\n",
        f"answer,question\n{SOLUTION},{PUZZLE.replace('.', '-')}\n"
        f"{SECOND_SOLUTION},{SECOND.replace('.', '*')}\n",
        f"{PUZZLE},{SOLUTION}\n{SECOND},{SECOND_SOLUTION}\n",
        f"puzzle\n{PUZZLE}\n{SECOND}\n",
        f"{PUZZLE}\n{SECOND}\n",
        f"puzzle,solution\n{PUZZLE}\n{SECOND},\n",
        f'puzzle,solution\n"1..2\n..3.\n.4..\n3...",{SOLUTION}\n{SECOND},{SECOND_SOLUTION}\n',
    ],
    ids=[
        "plain",
        "spreadsheet",
        "kaggle",
        "extreme",
        "order",
        "bare",
        "unsolved",
        "bare unsolved",
        "short",
        "lines",
    ],
)
def test_csv(tmp_path: Path, content: str) -> None:
    rows = verified(read_sudoku_file(written(tmp_path / "a.csv", content)))
    assert [text(grid) for grid in rows.puzzles] == [grid.replace(".", "0") for grid in (PUZZLE, SECOND)]
    assert [text(grid) for grid in rows.solutions] == [SOLUTION, SECOND_SOLUTION]
    assert rows.shape == SHAPES[4]


@pytest.mark.parametrize(
    "grid",
    [
        PUZZLE,
        "1..2 ..3. .4.. 3...",
        "1..2\n..3.\n\n.4..\n3...\n",
        [1, 0, 0, 2, 0, 0, 3, None, 0, 4, 0, 0, 3, 0, 0, 0],
        [[1, 0, 0, 2], [0, 0, 3, 0], [0, 4, 0, 0], [3, 0, 0, 0]],
        ["1..2", "..3.", ". 4 . .", "3..."],
        list(PUZZLE),
    ],
)
def test_jsonl(tmp_path: Path, grid: Any) -> None:
    lines = (
        json.dumps({"Puzzle": grid, "solution": SOLUTION}) + "\n\n" + json.dumps({"question": grid}) + "\n"
    )
    rows = verified(read_sudoku_file(written(tmp_path / "a.jsonl", lines)))
    assert [text(row) for row in rows.puzzles] == [PUZZLE.replace(".", "0")] * 2
    assert [text(row) for row in rows.solutions] == [SOLUTION] * 2


GOOD = f"puzzle,solution\n{PUZZLE},{SOLUTION}\n"


@pytest.mark.parametrize(
    "content, words",
    [
        (f"{GOOD}{PUZZLE},{SOLUTION[:-1]}1\n", "row 2: the solution is wrong: row 4 contains 1 twice"),
        (
            f"{GOOD}{PUZZLE},{SECOND_SOLUTION}\n",
            "row 2: the solution is wrong: cell (1, 1) contradicts its clue",
        ),
        (f"{GOOD}{PUZZLE},{SOLUTION[:-1]}.\n", "row 2: the solution is wrong: cell (4, 4) is blank"),
        (f"{GOOD}1{'.' * 15},{SOLUTION}\n", "row 2: the puzzle has more than one solution"),
        (f"{GOOD}1{'.' * 15},\n", "row 2: the puzzle has more than one solution"),
        (f"{GOOD}11{'.' * 14},\n", "row 2: the puzzle has no solution: row 1 contains 1 twice"),
        (f"{GOOD}123....4{'.' * 8},\n", "row 2: the puzzle has no solution; correct"),
        (f"{GOOD}{PUZZLE[:-1]},{SOLUTION}\n", "row 2: the puzzle has 15 cells instead of 16"),
        (f"{GOOD}{PUZZLE},{SOLUTION}1\n", "row 2: the solution has 17 cells instead of 16"),
        (
            f'{GOOD}"1..2\n..3.\n.4.\n3....",{SOLUTION}\n',
            "row 2: the puzzle is ragged: row 3 has 3 cells",
        ),
        (f"{GOOD}{PUZZLE[:-1]}x,{SOLUTION}\n", "row 2: cell (4, 4) of the puzzle is 'x', which is neither"),
        (f"{GOOD}{PUZZLE[:-1]}é,{SOLUTION}\n", "row 2: cell (4, 4) of the puzzle is 'é', which is neither"),
        (f"{GOOD}{PUZZLE},{SOLUTION[:-1]}5\n", "row 2: cell (4, 4) of the solution is '5', which is neither"),
        (
            f"{GOOD}{'.' * 81},{'.' * 81}\n",
            "row 2: the puzzle has 81 cells instead of 16 as before",
        ),
        ("puzzle\n12345\n", "row 1: a grid of 5 cells is not a Sudoku"),
        ("", "has no puzzles"),
        ("puzzle,solution\n", "has no puzzles"),
        ("a,b\n1,2\n", "a grid of 16, 36 or 81 cells, and as a header this line has no column puzzle"),
    ],
)
def test_refusals_of_csv(tmp_path: Path, content: str, words: str) -> None:
    path = written(tmp_path / "a.csv", content)
    with pytest.raises(InputError) as refusal:
        verified(read_sudoku_file(path))
    message = str(refusal.value)
    assert words in message
    assert message.startswith(str(path)) and "\n" not in message


@pytest.mark.parametrize(
    "line, words",
    [
        ("{", "row 2: not JSON"),
        ("[1]", "row 2: not a JSON object"),
        ('{"x": 1}', "row 2: no column puzzle, quizzes or question among x"),
        ('{"puzzle": 5}', "row 2: the puzzle is 5, which is not a grid"),
        ('{"puzzle": [[1, 2], [3]]}', "row 2: the puzzle is ragged: row 2 has 1 cells, row 1 has 2"),
        ('{"puzzle": [10, 1]}', "row 2: the puzzle has a cell 10"),
        ('{"puzzle": [true, 1]}', "row 2: the puzzle has a cell True"),
        ('{"puzzle": []}', "row 2: the puzzle has 0 cells"),
    ],
)
def test_refusals_of_jsonl(tmp_path: Path, line: str, words: str) -> None:
    path = written(tmp_path / "a.jsonl", json.dumps({"puzzle": PUZZLE}) + "\n" + line + "\n")
    with pytest.raises(InputError) as refusal:
        read_sudoku_file(path)
    assert words in str(refusal.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_sudoku_file(tmp_path / "none.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read"):
        read_sudoku_file(tmp_path / "binary.csv")


def test_trust_skips_only_the_search(tmp_path: Path) -> None:
    two = f"puzzle,solution\n1{'.' * 15},{SOLUTION}\n"
    rows = read_sudoku_file(written(tmp_path / "two.csv", two))
    assert text(verified(rows, trust=True).solutions[0]) == SOLUTION
    with pytest.raises(InputError, match="more than one"):
        verified(rows)
    wrong = read_sudoku_file(written(tmp_path / "wrong.csv", f"{PUZZLE},{SOLUTION[:-1]}1\n"))
    with pytest.raises(InputError, match="row 1: the solution is wrong"):
        verified(wrong, trust=True)
    unsolved = read_sudoku_file(written(tmp_path / "unsolved.csv", f"{PUZZLE}\n1{'.' * 15}\n"))
    solved = verified(unsolved, trust=True)
    for puzzle, solution in zip(solved.puzzles.tolist(), solved.solutions.tolist(), strict=True):
        assert solution_fault(puzzle, solution, SHAPES[4]) is None


def test_ratings(tmp_path: Path) -> None:
    content = f"question,answer,rating\n{PUZZLE},{SOLUTION},2\n{SECOND},{SECOND_SOLUTION},9.5\n"
    rows = read_sudoku_file(written(tmp_path / "a.csv", content))
    assert rows.rated(3).numbers.tolist() == [2]
    with pytest.raises(InputError, match=r"--min-rating of at most 9\.5"):
        rows.rated(10)
    with pytest.raises(InputError, match="no column rating"):
        read_sudoku_file(written(tmp_path / "b.csv", GOOD)).rated(3)
    words = written(tmp_path / "c.csv", f"question,answer,rating\n{PUZZLE},{SOLUTION},easy\n")
    with pytest.raises(InputError, match="row 1: the rating 'easy' is not a number"):
        read_sudoku_file(words).rated(3)


def test_held_out_puzzles_of_a_file_are_not_trained_on(tmp_path: Path) -> None:
    shape = SHAPES[4]
    made = [text(puzzle) for puzzle, _ in generate(shape, 20, (4, 8), seed=0)]
    # Each puzzle occurs again upside down and unchanged.
    lines = [line for grid in made for line in (grid, grid[::-1], grid)]
    rows = read_sudoku_file(written(tmp_path / "a.csv", "\n".join(lines) + "\n"))

    def split(**options: Any) -> dict[str, list[Grid]]:
        splits = held_out_splits(
            rows, None, **{"train": None, "test": 6, "fraction": 0.1, "seed": 0, "trust": False} | options
        )
        for part in splits.values():
            for puzzle, solution in zip(part.inputs, part.labels, strict=True):
                assert solution_fault(tokens_grid(puzzle), tokens_grid(solution), shape) is None
        return {
            name: [canonical(tokens_grid(puzzle), shape) for puzzle in part.inputs.tolist()]
            for name, part in splits.items()
        }

    forms = split()
    assert len(forms["test"]) == len(set(forms["test"])) == 6
    assert not set(forms["test"]) & set(forms["train"])
    assert len(forms["train"]) == 60 - 18
    assert split() == forms
    assert split(seed=1) != forms
    assert len(split(train=10)["train"]) == 10
    assert len(split(test=None)["test"]) == 6
    with pytest.raises(InputError, match="42 puzzles are left for the split train, but 50 were"):
        split(train=50)
    with pytest.raises(InputError, match="20 puzzles are left for the split test, but 30 were"):
        split(test=30)


def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name: str) -> Any:
        asked.append(name)
        train = {"source": ["x"] * 2, "question": [PUZZLE, SECOND], "answer": [SOLUTION, SECOND_SOLUTION]}
        test = {"source": ["x"], "question": [PUZZLE], "answer": [SOLUTION]}
        return datasets.DatasetDict(
            train=datasets.Dataset.from_dict({**train, "rating": [0, 64]}),
            test=datasets.Dataset.from_dict({**test, "rating": [5]}),
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    splits = read_sudoku_dataset("sapientinc/sudoku-extreme")
    assert asked == ["sapientinc/sudoku-extreme"]
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 2, "test": 1}
    train = verified(splits["train"])
    assert [text(row) for row in train.solutions] == [SOLUTION, SECOND_SOLUTION]
    assert train.rated(1).numbers.tolist() == [2]

    def broken(name: str) -> Any:
        columns = {"question": [PUZZLE], "answer": [SECOND_SOLUTION]}
        return datasets.DatasetDict(test=datasets.Dataset.from_dict(columns))

    monkeypatch.setattr(datasets, "load_dataset", broken)
    with pytest.raises(InputError, match=r"some/name \(test\), row 1: the solution is wrong"):
        verified(read_sudoku_dataset("some/name")["test"])
    other = datasets.DatasetDict(train=datasets.Dataset.from_dict({"x": [1]}))
    monkeypatch.setattr(datasets, "load_dataset", lambda name: other)
    with pytest.raises(InputError, match="the data set some/name has no column puzzle"):
        read_sudoku_dataset("some/name")


def test_a_data_set_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load_dataset(name: str) -> Any:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match=r"some/name cannot be loaded \(no network\): check"):
        read_sudoku_dataset("some/name")


@pytest.mark.slow
@pytest.mark.skipif(not EXPERT.exists(), reason=f"{EXPERT} is not there")
def test_expert_puzzles_are_verified_in_seconds() -> None:
    start = time.process_time()
    rows = verified(read_sudoku_file(EXPERT))
    assert len(rows) == 3000 and rows.shape == SHAPES[9]
    assert np.count_nonzero(rows.puzzles, axis=1).min() >= 17
    assert time.process_time() - start < 15


def test_a_header_of_several_lines_is_named_on_one(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('"\n1...,2\n3,4\n')
    with pytest.raises(InputError, match=r"question among 1\.\.\.,2 3,4: name") as refused:
        read_sudoku_file(tmp_path / "a.csv")
    assert "\n" not in str(refused.value)
