"""``llm-trm data sudoku``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from llm_trm.cli.group import Group
from llm_trm.data.puzzles.dataset import read_info, read_split
from llm_trm.data.puzzles.sudoku import SHAPES, count_solutions, generate, solution_fault, tokens_grid


def command(*arguments: object) -> Result:
    group = Group(commands_at={"sudoku": "llm_trm.cli.data.sudoku:sudoku"})
    return CliRunner().invoke(group, ["sudoku", *map(str, arguments)])


def text(grid: Any) -> str:
    return "".join(map(str, grid))


@pytest.fixture(scope="module")
def csv_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sudoku") / "puzzles.csv"
    pairs = generate(SHAPES[6], 30, (12, 18), seed=0)
    lines = [f"{text(puzzle)},{text(solution)},{index}" for index, (puzzle, solution) in enumerate(pairs)]
    path.write_text("\n".join(["question,answer,rating", *lines]) + "\n")
    return path


@pytest.mark.parametrize("size, clues", [(4, (5, 7)), (6, (11, 15)), (9, (30, 32))])
def test_generated(tmp_path: Path, size: int, clues: tuple[int, int]) -> None:
    result = command(
        "--size", size, "--num-samples", 10, "--test-samples", 4, "--clues", *clues, "-o", tmp_path / "new"
    )
    assert result.exit_code == 0, result.output
    assert f"10 {size}x{size} Sudokus to train on, 4 held out" in result.output
    info = read_info(tmp_path / "new")
    assert (info.task, info.rows, info.columns, info.vocab_size, info.num_puzzles) == (
        "sudoku", size, size, size + 2, 1
    )  # fmt: skip
    assert info.facts == {"source": "generated", "seed": 0, "clues": list(clues)}
    for name, count in (("train", 10), ("test", 4)):
        split = read_split(tmp_path / "new", name)
        assert len(split) == count
        assert split.inputs.dtype == split.labels.dtype == torch.uint8
        for puzzle, solution in zip(split.inputs, split.labels, strict=True):
            grid = tokens_grid(puzzle)
            assert solution_fault(grid, tokens_grid(solution), SHAPES[size]) is None
            assert count_solutions(grid) == 1
            assert clues[0] <= sum(map(bool, grid)) <= clues[1]


def test_the_seed_decides(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        options = ("--size", 4, "--num-samples", 5, "--test-samples", 2, "--seed", seed)
        assert command(*options, "-o", tmp_path / name).exit_code == 0
    a, b, c = (read_split(tmp_path / name, "train").inputs for name in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_from_a_file(tmp_path: Path, csv_file: Path) -> None:
    result = command("--input", csv_file, "--test-fraction", 0.2, "-o", tmp_path)
    assert result.exit_code == 0, result.output
    assert "24 6x6 Sudokus to train on, 6 held out" in result.output
    assert read_info(tmp_path).facts["source"] == str(csv_file)
    result = command(
        "--input",
        csv_file,
        "--test-samples",
        5,
        "--subsample",
        8,
        "--min-rating",
        10,
        "-o",
        tmp_path,
        "--overwrite",
    )
    assert "8 6x6 Sudokus to train on, 5 held out" in result.output


def test_from_the_hub(tmp_path: Path, csv_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [line.split(",") for line in csv_file.read_text().split()[1:]]
    columns = [dict(zip(("question", "answer", "rating"), row, strict=True)) for row in rows]
    # One puzzle of the test split is also a training puzzle.
    splits = datasets.DatasetDict(
        train=datasets.Dataset.from_list(columns[:20]), test=datasets.Dataset.from_list(columns[19:])
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda name: splits)
    result = command("--dataset", "sapientinc/sudoku-extreme", "-o", tmp_path)
    assert result.exit_code == 0, result.output
    assert "19 6x6 Sudokus to train on, 11 held out" in result.output
    result = command(
        "--dataset", "x/y", "--subsample", 5, "--test-samples", 3, "--trust", "-o", tmp_path / "b"
    )
    assert "5 6x6 Sudokus to train on, 3 held out" in result.output


@pytest.mark.parametrize(
    "options, words",
    [
        (("--input", "a.csv", "--dataset", "x/y"), "--input and --dataset cannot be used together"),
        (("--input", "a.csv", "--size", 4), "--size can be used without --input or --dataset"),
        (("--input", "a.csv", "--clues", 4, 5), "--clues can be used without --input"),
        (("--trust",), "--trust can be used only with --input or --dataset"),
        (("--subsample", 3), "--subsample can be used only with --input"),
        (("--input", "a.csv", "--test-samples", 3, "--test-fraction", 0.1), "cannot be used together"),
        (("--size", 4, "--clues", 9, 5), "--clues 9 5: give the fewest first"),
        (("--size", 4, "--clues", 5, 17), "at most 16"),
        (("--size", 4, "--clues", 4, 4), "use fewer puzzles, or allow more clues"),
        (("--input", "missing.csv"), "missing.csv does not exist"),
        (("--size", 5), "'5' is not one of"),
    ],
)
def test_mistakes_end_with_2_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[object, ...], words: str
) -> None:
    monkeypatch.setattr("llm_trm.data.puzzles.sudoku._MAX_FAILURES", 100)
    result = command(*options, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert words in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not (tmp_path / "out/dataset.json").exists()


def test_a_bad_row_is_named(tmp_path: Path, csv_file: Path) -> None:
    lines = csv_file.read_text().split()
    puzzle, solution, rating = lines[3].split(",")
    lines[3] = f"{puzzle},{solution[1:] + solution[0]},{rating}"
    bad = tmp_path / "bad.csv"
    bad.write_text("\n".join(lines))
    result = command("--input", bad, "--test-samples", 3, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert f"{bad}, row 3: the solution is wrong" in result.output


def test_help_names_every_default() -> None:
    result = command("--help")
    assert "4 8 for 4x4, 9 18 for 6x6, 24 36 for 9x9" in " ".join(result.output.split())
