"""Text input: byte order marks are ignored, only a newline ends a line, everything else is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import llm_trm.text
from llm_trm.benchmark import results
from llm_trm.cli import main
from llm_trm.cli.group import UserError
from llm_trm.data import problems
from llm_trm.data.pairs import _read_records
from llm_trm.data.puzzles.maze_files import read_mazes
from llm_trm.data.puzzles.sudoku_files import read_sudoku_file
from llm_trm.data.questions import load_solved
from llm_trm.errors import InputError
from llm_trm.evaluate.questions import read_questions
from llm_trm.files import read_json
from llm_trm.text import is_text, normalise_spaces, parse_json, read_lines, read_text, split_lines
from llm_trm.train.phase1 import texts
from llm_trm.train.phase3.train import _keep_completions
from llm_trm.train.run.tracking import lines_until

#: Separators of str.splitlines other than a newline.
CUTS = ("\u2028", "\u2029", "\x85", "\f", "\v", "\x1c", "\r")
MARK = b"\xef\xbb\xbf"
ODD = f"1{''.join(CUTS)}+1"
GRID = "1234341221434321"
NOT_TEXT = {"latin": "é".encode("latin-1"), "utf-16": "7+1\n".encode("utf-16"), "no mark": b"7\0+\0001\0\n\0"}


def generate(*arguments: str | Path, stdin: bytes | None = None) -> Result:
    words = ["generate", "--model", "arithmetic", "--device", "cpu", "--max-new-tokens", "40"]
    return CliRunner().invoke(main, [*words, *map(str, arguments)], input=stdin)


def test_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(MARK + f"{ODD}\r\n\n".encode() + MARK + b"end")
    assert list(read_lines(file)) == [ODD, "", "end"]
    assert read_text(file) == f"{ODD}\n\nend"
    assert split_lines(f"\ufeff{ODD}\r\nend\n") == [ODD, "end", ""]


@pytest.mark.parametrize("content", NOT_TEXT.values(), ids=NOT_TEXT)
def test_invalid_bytes_are_rejected_with_their_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"1+1\n" + content)
    with pytest.raises(UnicodeDecodeError, match="in line 2"):
        read_text(tmp_path / "a.txt")


def test_an_endless_line_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm_trm.text, "_LONGEST_LINE", 8)
    (tmp_path / "a.txt").write_bytes(b"1234567\n\n12345678\n")
    lines = read_lines(tmp_path / "a.txt")
    assert [next(lines), next(lines)] == ["1234567", ""]
    with pytest.raises(OSError, match="line 3 is longer than 8 bytes"):
        next(lines)
    if (zeros := Path("/dev/zero")).exists():
        with pytest.raises(InputError, match=r"/dev/zero cannot be read \(.*line 1 is longer"):
            read_json(zeros, "name a file")


def test_questions_are_compared_by_their_words() -> None:
    assert normalise_spaces(" 1 +\t\u00a02\r\n") == normalise_spaces("1 + 2") != normalise_spaces("1+2")


def test_json_of_strings_that_are_text() -> None:
    assert parse_json('"\\ud83d\\ude00 \\\\ud800"') == "\U0001f600 \\ud800"
    for text in ('{"a": ["\\uD800"]}', '{"\\udfff": 1}', "[" * 100_000, "{"):
        with pytest.raises(ValueError):
            parse_json(text)
    assert is_text("é") and not is_text("1+1\udcff")


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_byte_order_mark_on_standard_input_is_ignored(end: bytes) -> None:
    plain = generate(stdin=b"7+1" + end + b"2+2")
    assert plain.stdout == "8\n4\n"
    assert generate(stdin=MARK + b"7+1" + end + MARK + b"2+2").stdout == plain.stdout
    assert generate("--input", "-", stdin=MARK + b"7+1" + end + b"2+2" + end).stdout == plain.stdout
    assert generate("\ufeff7+1").stdout == "8\n"


@pytest.mark.parametrize("cut", CUTS)
def test_only_newlines_separate_questions(cut: str, tmp_path: Path) -> None:
    file, written = tmp_path / "q.txt", tmp_path / "said.jsonl"
    file.write_bytes(f"7+1{cut}+2\n3+3\n".encode())
    for arguments, stdin in ((("--input", file), None), ((), file.read_bytes())):
        result = generate(*arguments, "-o", written, "--overwrite", stdin=stdin)
        assert result.exit_code == 0, result.output
        assert [json.loads(line)["question"] for line in read_lines(written)] == [f"7+1{cut}+2", "3+3"]


@pytest.mark.parametrize("content", NOT_TEXT.values(), ids=NOT_TEXT)
def test_input_of_another_encoding_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_bytes(content)
    for arguments, stdin in ((("--input", tmp_path / "q.txt"), None), ((), content)):
        result = generate(*arguments, stdin=stdin)
        assert result.exit_code == UserError.exit_code and result.stderr.count("\n") == 1, result.output
        assert "in UTF-8" in result.stderr and "in line 1" in result.stderr and not result.stdout
    result = generate("7+1\udcff")
    assert result.exit_code == 2 and "is not text in UTF-8" in result.stderr


def test_a_typed_line_of_another_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_trm.cli.generate._is_terminal", lambda: True)
    result = generate(stdin=b"\xff\n")
    assert result.exit_code == 0 and "is not text in UTF-8" in result.stderr


def test_puzzles_of_a_text() -> None:
    for text in (f"\ufeff{GRID}", f"\ufeff{GRID[:8]}\r\n\ufeff{GRID[8:]}\r\n"):
        (question,) = read_questions(text, "PUZZLE")
        assert question.task == "sudoku" and question.rows == 4
    (maze,) = read_questions("\ufeff####\r\n#SG#\r\n####\r\n", "PUZZLE")
    assert (maze.task, maze.rows, maze.columns) == ("maze", 3, 4)
    with pytest.raises(InputError, match="looks like JSON"):
        read_questions("\ufeff{}", "PUZZLE")
    # A form feed does not end a line: these would be two puzzles.
    with pytest.raises(InputError, match="32 cells"):
        read_questions(f"{GRID}\f{GRID}", "PUZZLE")


#: The questions that each reader of records returns for a file with a question and its answer, passed as
#: JSON.
READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "problems": (".jsonl", lambda path: [one.text for one in problems.read_questions(path)]),
    "array": (".json", lambda path: [one.text for one in problems.read_questions(path)]),
    "solved": (".jsonl", lambda path: [one.question for one in load_solved(str(path))]),
    "texts": (".jsonl", lambda path: [record["question"] for _, record in texts._json_lines(path)]),
    "results": (".jsonl", lambda path: [line["question"] for line in results.read(path)]),
    "pairs": (".jsonl", lambda path: [record["question"] for record in _read_records(path, 2)]),
    "json": (".json", lambda path: [record["question"] for record in read_json(path, "")]),
    "metrics": (".jsonl", lambda path: _questions(lines_until(path, 9))),
    "completions": (".jsonl", lambda path: _keep_completions(path, 9) or _questions(path.read_text("utf-8"))),
}


def _questions(lines: str) -> list[str]:
    return [json.loads(line)["question"] for line in lines.split("\n") if line]


@pytest.mark.parametrize("reader", READERS)
def test_readers_of_records(reader: str, tmp_path: Path) -> None:
    ending, read = READERS[reader]
    # JSON always escapes control characters.
    asked = "1\u2028\u2029\x85+1"
    rows = [{"step": 1, "question": asked, "answer": "2"}, {"step": 2, "question": "2+2", "answer": "4"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = "\r\n".join(lines) if ending == ".jsonl" else f"[{', '.join(lines)}]"
    (tmp_path / f"a{ending}").write_bytes(MARK + text.encode() + b"\r\n")
    assert read(tmp_path / f"a{ending}") == [asked, "2+2"]


@pytest.mark.parametrize("reader", ["results", "metrics", "completions"])
def test_lines_that_a_crash_left_are_left_out(reader: str, tmp_path: Path) -> None:
    row = json.dumps({"step": 1, "question": "1+1"}).encode()
    (tmp_path / "a.jsonl").write_bytes(
        row + b"\n" + 40 * b"\0" + b"\n" + row + b"\n" + row[:-4] + b"\xe2\x80"
    )
    assert READERS[reader][1](tmp_path / "a.jsonl") == ["1+1", "1+1"]


@pytest.mark.parametrize("reader", ["problems", "array", "solved", "texts", "pairs", "json"])
def test_readers_reject_other_encodings(reader: str, tmp_path: Path) -> None:
    ending, read = READERS[reader]
    for content in (b'{"question": "\xe9"}', b'{"question": "\\ud800", "answer": "1"}', *NOT_TEXT.values()):
        (tmp_path / f"a{ending}").write_bytes(content if ending == ".jsonl" else b"[" + content + b"]")
        with pytest.raises(InputError) as refused:
            read(tmp_path / f"a{ending}")
        assert f"a{ending}" in str(refused.value) and "\n" not in str(refused.value)


def test_texts_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(MARK + "one\u2028\u2028more\r\nline\r\n\r\ntwo\f\ntoo\n".encode())
    assert list(texts._paragraphs(file)) == ["one\u2028\u2028more\nline", "two\f\ntoo"]


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_files_of_puzzles(ending: str, tmp_path: Path) -> None:
    def written(name: str, row: dict[str, str]) -> Path:
        csv = "\r\n".join((",".join(row), ",".join(f'"{cell}"' for cell in row.values()))) + "\r\n"
        text = csv if ending == ".csv" else json.dumps(row) + "\r\n"
        (tmp_path / f"{name}{ending}").write_bytes(MARK + text.encode())
        return tmp_path / f"{name}{ending}"

    rows = read_sudoku_file(written("sudoku", {"puzzle": GRID, "solution": GRID}))
    assert len(rows.puzzles) == 1
    # Cells of several lines keep them.
    ((grid, answer),) = read_mazes(written("maze", {"question": "###\nSG#\n###", "answer": "###\nSG#\n###"}))
    assert grid.shape == answer.shape == (3, 3)
    for content in NOT_TEXT.values():
        (tmp_path / f"bad{ending}").write_bytes(content)
        for read in (read_sudoku_file, read_mazes):
            with pytest.raises(InputError, match=r"UTF-8|utf-8"):
                read(tmp_path / f"bad{ending}")
