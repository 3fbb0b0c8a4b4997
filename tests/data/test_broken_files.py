"""Every reader of users' files turns a broken one into one short line that names it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_trm.cli.options.settings import read_config
from llm_trm.cli.text_input import read_input
from llm_trm.data.problems import read_questions
from llm_trm.data.puzzles.arc_files import read_tasks
from llm_trm.data.puzzles.arc_folder import read_arc
from llm_trm.data.puzzles.dataset import read_info
from llm_trm.data.puzzles.maze_files import read_mazes
from llm_trm.data.puzzles.sudoku_files import read_sudoku_file
from llm_trm.data.puzzles.sudoku_rows import verified
from llm_trm.data.questions import load_solved
from llm_trm.errors import InputError
from llm_trm.evaluate.questions import read_questions as read_puzzles
from llm_trm.models.loading import ThinkingModel, load_thinking_model
from llm_trm.models.puzzle.official_config import read_config as read_official_config
from llm_trm.train.phase1.texts import read_texts

GRID = "1..2..3..4..3..."
HUGE, LARGE, LONG = "9" * 5000, "9" * 400, "x" * 300_000
DEEP, NESTED = "[" * 30_000, "[" * 900 + "]" * 900
#: JSON values; most have the wrong type, whatever the field.
VALUES = {
    "null": "null",
    "true": "true",
    "infinite": "1e999",
    "nan": "NaN",
    "huge": HUGE,
    "large": LARGE,
    "empty": '""',
    "surrogate": '"\\ud800"',
    "list": "[1]",
    "mapping": '{"a": 1}',
    "deep": DEEP,
    "nested": NESTED,
    "long": f'"{LONG}"',
    "ragged": "[[1, 2], [3]]",
    "infinite cell": "[[1e999]]",
    "large cell": f"[[{LARGE}]]",
    "empty mapping": "[{}]",
    "turn": '[{"role": null, "content": "a"}]',
    "content": '[{"role": "user", "content": 1}]',
    "part": '[{"role": "user", "content": [1]}]',
    "speaker": '[{"from": [1], "value": "a"}]',
}
#: Whole files.
CONTENTS = {
    "empty": b"",
    "newline": b"\r\n",
    "marks": b"\xef\xbb\xbf\xef\xbb\xbf",
    "nul": b"\0" * 100,
    "utf-16": "[1]".encode("utf-16"),
    "latin-1": b"\xe9",
    "half": b'{"question": ',
    "quotes": b'"' * 200_000,
    "deep list": DEEP.encode(),
    "deep mapping": b'{"a": ' * 30_000,
    "deep flow": b"- " * 3000,
    "blank cell": b'""\n',
    "cell": b'puzzle,question\n"1..\n',
    "large cell": b'a,b\n"' + b"x" * 200_000 + b'"',
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "zip": b"PK\x03\x04\xff\xfe",
    "date": b"2020-99-99: 1",
    "cycle": b"arch: &a [*a]\n",
}


@pytest.fixture(scope="module")
def model() -> ThinkingModel:
    return load_thinking_model("arithmetic", "cpu")


def record(**fields: str) -> str:
    return "{" + ", ".join(f'"{name}": {value}' for name, value in fields.items()) + "}"


def arch(**fields: str) -> str:
    return record(arch=record(name='"recursive_reasoning.trm@TRM"', **fields))


Read = Callable[[Path, ThinkingModel], Any]
#: Name of the file, its reader, and files around a value.
READERS: dict[str, tuple[Read, list[Callable[[str], str]]]] = {
    "problems.jsonl": (
        lambda path, _: list(read_questions(path)),
        [lambda v: record(question=v), lambda v: record(question='"q"', answer=v)],
    ),
    "problems.json": (lambda path, _: list(read_questions(path)), [lambda v: f"[{record(question=v)}]"]),
    "solved.jsonl": (
        lambda path, _: load_solved(str(path)),
        [
            lambda v: record(question=v, answer="1"),
            lambda v: record(question='"q"', answer=v),
            lambda v: record(question='"q"', answer='"a"', thinking=v),
            lambda v: record(question='"q"', answer='"a"', think=v),
        ],
    ),
    "texts.jsonl": (
        lambda path, model: list(read_texts(str(path), model, thinking=True)),
        [
            lambda v: record(text=v),
            lambda v: record(messages=v),
            lambda v: record(question='"q"', thinking=v),
        ],
    ),
    "texts.txt": (lambda path, model: list(read_texts(str(path), model, thinking=True)), []),
    "sudoku.jsonl": (
        lambda path, _: verified(read_sudoku_file(path)).rated(0),
        [
            lambda v: record(puzzle=v),
            lambda v: record(puzzle=f'"{GRID}"', solution=v),
            lambda v: record(puzzle=f'"{GRID}"', rating=v),
        ],
    ),
    "sudoku.csv": (
        lambda path, _: verified(read_sudoku_file(path)).rated(0),
        [lambda v: f"puzzle,rating\n{GRID},{v[:100_000]}\n", lambda v: f"puzzle\n{v}\n"],
    ),
    "sudoku.sdk": (lambda path, _: verified(read_sudoku_file(path)), []),
    "maze.jsonl": (lambda path, _: read_mazes(path), [lambda v: record(question=v, answer=v)]),
    "maze.csv": (lambda path, _: read_mazes(path), [lambda v: f"question,answer\n{v},{v}\n"]),
    "arc.json": (
        lambda path, _: read_tasks(path),
        [
            lambda v: record(train=v, test=v),
            lambda v: record(train=f"[{record(input=v, output='[[1]]')}]", test="[]"),
        ],
    ),
    "a_challenges.json": (lambda path, _: read_tasks(path), [lambda v: record(task=v)]),
    "all_config.yaml": (
        lambda path, _: read_official_config(path.with_name("step_1")),
        [
            lambda v: record(arch=v),
            lambda v: record(arch=record(name=v)),
            lambda v: arch(rms_norm_eps=v),
            lambda v: arch(rope_theta=v),
            lambda v: arch(num_heads=v),
            lambda v: arch(puzzle_emb_len=v),
        ],
    ),
    "c.json": (lambda path, _: read_config(path), []),
    "c.toml": (lambda path, _: read_config(path), [lambda v: f"a = {v}"]),
    "puzzles.txt": (lambda path, _: read_puzzles(*read_input(path, "puzzles")), []),
    "arc/arc.json": (
        lambda path, _: read_arc(path.parent),
        [
            lambda v: record(identifiers=v, tests=v),
            lambda v: record(identifiers=f'[["a", {v}, "0123456789"]]', tests="{}"),
            lambda v: record(identifiers=f'[["a", 1, {v}]]', tests="{}"),
            lambda v: record(identifiers="[]", tests=record(a=f"[{record(input=v, output=v)}]")),
        ],
    ),
    "d/dataset.json": (
        lambda path, _: read_info(path.parent),
        [
            lambda v: record(task=v, rows="4", columns="4", vocab_size="6", splits="{}"),
            lambda v: record(task='"sudoku"', rows=v, columns="4", vocab_size="6", splits="{}"),
            lambda v: record(task='"sudoku"', rows="4", columns="4", vocab_size="6", facts=v, splits="{}"),
        ],
    ),
}


def broken(name: str) -> Iterator[bytes]:
    yield from CONTENTS.values()
    for around in (lambda v: v, *READERS[name][1]):
        for value in VALUES.values():
            yield around(value).encode()


@pytest.mark.parametrize("name", READERS)
def test_a_broken_file_is_read_or_refused_in_one_line(
    name: str, model: ThinkingModel, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    refused = 0
    for content in broken(name):
        path.write_bytes(content)
        try:
            READERS[name][0](path, model)
        except InputError as error:
            message = str(error)
            assert str(tmp_path) in message and "\n" not in message, (content[:80], message)
            assert len(message) < 700, (content[:80], message[:800])
            refused += 1
    assert refused > 5 or name == "texts.txt"


@pytest.mark.parametrize("name", [name for name in READERS if name != "all_config.yaml"])
def test_a_file_that_is_missing_or_a_folder(name: str, model: ThinkingModel, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    for _ in range(2):
        with pytest.raises(InputError, match=str(tmp_path)) as error:
            READERS[name][0](path, model)
        assert "\n" not in str(error.value)
        path.mkdir(exist_ok=True)


@pytest.mark.parametrize("number", [LARGE, f"-{LARGE}"])
def test_a_whole_number_of_any_size_is_an_answer(number: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(record(question='"q"', answer=number))
    assert [one.answer for one in read_questions(tmp_path / "a.jsonl")] == [number]


@pytest.mark.parametrize("answer", ["1e999", "NaN", "-Infinity"])
def test_no_answer_is_infinite(answer: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(record(question='"q"', answer=answer))
    for read in (lambda path: list(read_questions(path)), lambda path: load_solved(str(path))):
        with pytest.raises(InputError, match="neither text nor a finite number"):
            read(tmp_path / "a.jsonl")


def test_endings_in_upper_case(tmp_path: Path, model: ThinkingModel) -> None:
    row = json.dumps({"puzzle": GRID, "question": "q", "answer": "a"}) + "\r\n"
    path = tmp_path / "A.JSONL"
    path.write_bytes(b"\xef\xbb\xbf" + 2 * row.encode())
    assert len(list(read_questions(path))) == len(load_solved(str(path))) == 2
    assert len(list(read_texts(str(path), model, thinking=False))) == 2
    (tmp_path / "._A.JSONL").write_bytes(b"\0")
    assert len(list(read_texts(str(tmp_path), model, thinking=False))) == 2
    (tmp_path / "S.JSONL").write_text(json.dumps({"puzzle": GRID}))
    assert len(read_sudoku_file(tmp_path / "S.JSONL")) == 1
    (tmp_path / "M.CSV").write_text('question,answer\n"#S\n#G","#S\n#G"\n')
    assert len(read_mazes(tmp_path / "M.CSV")) == 1
    (tmp_path / "C.TOML").write_text("steps = 3")
    assert read_config(tmp_path / "C.TOML") == {"steps": 3}
