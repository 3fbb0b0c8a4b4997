"""Tests of Sudokus in the formats of other programs, and of drawings pasted back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llm_trm.cli.puzzle_grids import draw
from llm_trm.data.puzzles.sudoku_files import read_sudoku_file
from llm_trm.errors import InputError
from llm_trm.evaluate.questions import read_questions

EXPERT = "98.7.....7.....6....6.5......4..5.3...79..5......2...1..85..9......1...4.....3.2."
ROWS = [EXPERT[start : start + 9] for start in range(0, 81, 9)]
BARRED = ["|".join((row[:3], row[3:6], row[6:])) for row in ROWS]
SPACED = [" ".join(row) for row in ROWS]


def banded(rows: list[str], rule: str) -> str:
    return f"\n{rule}\n".join("\n".join(rows[start : start + 3]) for start in (0, 3, 6)) + "\n"


LAYOUTS = {
    "rows": "\n".join(ROWS),
    "sdk": "#A Gabriel Sans\n#D Solve 9 rows\n#C\n#B 03-08-2006\n#L Hard\n" + "\n".join(ROWS) + "\n",
    "sdk with sections": "[Puzzle]\n" + "\n".join(ROWS) + "\n[State]\n" + "\n".join("1" * 9 for _ in ROWS),
    "sdm": f"# hard ones; S and G\n{EXPERT}\n",
    "ratings": f"{EXPERT} # ED=11.9/11.9/2.6 by SudokuExplainer\n",
    "ratings alone": f"{EXPERT} ED=11.9/11.9/2.6\n",
    "ss": banded(BARRED, "-----------"),
    "ss in a frame": "*-----------*\n"
    + banded([f"|{row}|" for row in BARRED], "|---+---+---|")
    + "*-----------*\n",
    "plus": banded(BARRED, "---+---+---"),
    "heavy": "┏━━━┳━━━┳━━━┓\n" + banded([f"┃{row.replace('|', '┃')}┃" for row in BARRED], "┣━━━╋━━━╋━━━┫"),
    "dashes as blanks": banded([row.replace(".", "-") for row in BARRED], "-----------"),
    "stars as blanks": "\n".join(row.replace(".", "*") for row in SPACED),
    "windows": "\ufeff" + banded(BARRED, "-----------").replace("\n", "\r\n"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_other_programs(name: str, tmp_path: Path) -> None:
    (question,) = read_questions(LAYOUTS[name], "PUZZLE")
    expected = [0 if cell == "." else int(cell) for cell in EXPERT]
    assert (question.task, question.rows) == ("sudoku", 9)
    assert (question.tokens - 1).tolist() == expected
    for ending in (".sdk", ".sdm", ".SS"):
        path = tmp_path / f"a{ending}"
        path.write_bytes(LAYOUTS[name].encode())
        assert read_sudoku_file(path).puzzles.tolist() == [expected]


def test_several_with_comments() -> None:
    text = f"#D first\n{LAYOUTS['ss']}\n#D second\n{LAYOUTS['rows']}\n# third\n{EXPERT}\n"
    assert [question.tokens.tolist() for question in read_questions(text, "PUZZLE")] == 3 * [
        read_questions(EXPERT, "PUZZLE")[0].tokens.tolist()
    ]


def test_a_row_of_blanks_is_no_rule() -> None:
    for text in ("1234\n----\n3412\n****", "12|34\n--|--\n34|12\n**|**"):
        (question,) = read_questions(text, "PUZZLE")
        assert (question.tokens - 1).tolist() == [1, 2, 3, 4, 0, 0, 0, 0, 3, 4, 1, 2, 0, 0, 0, 0]


def test_walls_are_no_comments() -> None:
    for text in ("#####\n#S G#\n#####", "S  #\n  # \n G  "):
        (question,) = read_questions(text, "PUZZLE")
        assert question.task == "maze"
    with pytest.raises(InputError, match="unknown character '1'"):
        read_questions("#S1\n#G#", "PUZZLE")


@pytest.mark.parametrize(
    "puzzle",
    ["1... ..3. .4.. ...2", "1...2." * 6, EXPERT, "#####\n#S  #\n# #G#\n#####", "  S\n # \nG  "],
    ids=["4x4", "6x6", "9x9", "maze", "open maze"],
)
@pytest.mark.parametrize("plain", [True, False], ids=["ascii", "boxes"])
def test_a_drawing_pasted_back_is_the_same_puzzle(puzzle: str, plain: bool) -> None:
    (question,) = read_questions(puzzle, "PUZZLE")
    drawn = draw(question, question.tokens, plain=plain).plain
    (again,) = read_questions(drawn, "PUZZLE")
    assert (again.task, again.rows, again.columns) == (question.task, question.rows, question.columns)
    assert torch.equal(again.tokens, question.tokens)


@pytest.mark.parametrize(
    "content",
    [
        "puzzles\tsolutions\n{0}\t{1}\n",
        "id\tpuzzle\tsolution\n1\t{0}\t{1}\n",
        "{0}\t{1}\n",
        "# from a list\n{0} # ED=1.2/1.2/1.2\n# the end\n",
        "# from a list\n\npuzzle,solution\n{0},{1}\n",
        "#,puzzle,solution\n1,{0},{1}\n",
        "#puzzle,solution\n{0},{1}\n",
    ],
)
def test_tables(content: str, tmp_path: Path) -> None:
    # The two header names of the first case have 16 letters, as many as a small grid has cells.
    puzzle, solution = "1..2..3..4..3...", "1342423124133124"
    path = tmp_path / "a.tsv"
    path.write_text(content.format(puzzle, solution))
    rows = read_sudoku_file(path)
    assert ["".join(map(str, grid)) for grid in rows.puzzles.tolist()] == [puzzle.replace(".", "0")]


def test_a_header_of_sixteen_letters_is_no_grid(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("numbers\tanswers12\n1\t2\n")
    with pytest.raises(InputError, match=r"does not start with a grid .* no column puzzle"):
        read_sudoku_file(path)


@pytest.mark.parametrize("rating", ["nan", "inf", "1e999", "9" * 5000, "hard", "x" * 10**6])
def test_ratings_that_are_no_numbers(rating: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    # csv limits a cell to 131,072 characters by itself.
    path.write_text(f"puzzle,rating\n1..2..3..4..3...,{rating[:100_000]}\n")
    with pytest.raises(InputError, match=r"row 1: the rating .* is not a number") as error:
        read_sudoku_file(path).rated(1.0)
    assert len(str(error.value)) < 400
