"""Tests of loading questions: their order, their sources, and errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_trm.data.arithmetic import World
from llm_trm.data.problems import HUB, Question, load_questions, located
from llm_trm.errors import InputError


def _write(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_arithmetic_uses_the_given_world() -> None:
    world = World(2, 3, 10)
    questions = load_questions("arithmetic", 5, split="test", seed=4, world=world)
    assert questions == [Question(p.question, p.answer) for p in world.problems(5, "test", 4)]


@pytest.mark.parametrize("column", ["question", "problem", "Problem", "prompt", "text"])
def test_jsonl_columns(tmp_path: Path, column: str) -> None:
    path = _write(tmp_path / "a.jsonl", {column: "how?", "solution": "so"}, {column: "why?", "answer": 7})
    assert load_questions(path, 10) == [Question("how?", "so"), Question("why?", "7")]


def test_json_array(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"question": "how?"}, {"question": "why?", "answer": None}]))
    assert load_questions(str(path), 10) == [Question("how?", None), Question("why?", None)]


def test_mixture_alternates_and_the_first_sources_get_the_remainder(tmp_path: Path) -> None:
    a, b, c = (
        _write(tmp_path / f"{name}.jsonl", *({"question": f"{name}{i}"} for i in range(count)))
        for name, count in (("a", 9), ("b", 1), ("c", 9))
    )
    texts = [question.text for question in load_questions(f"{a}, {b},{c}", 8)]
    assert texts == ["a0", "b0", "c0", "a1", "c1", "a2"], "parts of 3, 3 and 2; b has only 1"
    assert texts[:3] == [question.text for question in load_questions(f"{a},{b},{c}", 3)]


def test_names_of_files_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert located("gsm8k, a.jsonl,b/c.json") == f"gsm8k,{tmp_path}/a.jsonl,{tmp_path}/b/c.json"
    assert located("owner/name:main") == "owner/name:main"
    assert located(f"{tmp_path}/a.jsonl") == f"{tmp_path}/a.jsonl"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_an_empty_file_has_no_problems(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("[]" if name == "a.json" else "\n")
    with pytest.raises(InputError, match=f"{name} has no problems"):
        load_questions(str(tmp_path / name), 3)


def test_only_as_many_lines_are_read_as_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"question": "how?"}\nnot json\n')
    assert load_questions(str(path), 1) == [Question("how?", None)]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"question": "how?"}\n{oops\n', ("a.jsonl, line 2", "not JSON")),
        (
            "a.jsonl",
            '{"id": 1, "body": "how?"}\n',
            ("a.jsonl, line 1", "'id', 'body'", "question or problem"),
        ),
        ("a.jsonl", "\n[1, 2]\n", ("a.jsonl, line 2", "JSON object")),
        ("a.jsonl", '{"question": 5}\n', ("a.jsonl, line 1", "'question'", "5")),
        ("a.jsonl", '{"question": " "}\n', ("a.jsonl, line 1", "'question'")),
        ("a.jsonl", '{"question": 1e400}\n', ("a.jsonl, line 1", "'question'", "inf")),
        ("a.jsonl", '{"question": "1", "answer": NaN}\n', ("a.jsonl, line 1", "'answer'", "nan")),
        ("a.jsonl", '{"question": "1", "answer": true}\n', ("a.jsonl, line 1", "'answer'", "True")),
        ("a.jsonl", '\n{"question": "1", "answer": ["1"]}\n', ("a.jsonl, line 2", "'answer'", "list")),
        ("a.json", '[{"question": "1", "solution": -1e400}]', ("a.json, record 1", "'solution'", "inf")),
        ("a.json", "{", ("a.json", "not JSON")),
        ("a.json", '{"question": "how?"}', ("a.json", "array")),
        ("a.json", '[{"question": "how?"}, {}]', ("a.json, record 2", "question")),
    ],
)
def test_bad_file_is_named_with_its_line(
    tmp_path: Path, name: str, content: str, words: tuple[str, ...]
) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(InputError) as error:
        load_questions(str(path), 10)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.jsonl cannot be read \(No such file"):
        load_questions(str(tmp_path / "missing.jsonl"), 1)
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xe9"}\n')
    with pytest.raises(InputError, match=r"latin\.jsonl cannot be read .*UTF-8"):
        load_questions(str(tmp_path / "latin.jsonl"), 1)


@pytest.mark.parametrize("dataset", ["gsm9k", ",", "gsm8k.csv"])
def test_unknown_name_is_rejected_with_the_valid_names(dataset: str) -> None:
    with pytest.raises(InputError, match=r"arithmetic, gsm8k, math"):
        load_questions(dataset, 1)


@pytest.mark.parametrize("name", sorted(HUB))
def test_hub_data_sets_are_streamed_and_worded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(path: str, config: str | None, **options: Any) -> Any:
        calls.append((path, config, options))
        source = HUB[name]
        return iter(
            [{source.question: f"do {i}", **({source.answer: i} if source.answer else {})} for i in range(9)]
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    questions = load_questions(name, 2, split="test")
    split = "train" if name == "aime" else "test"
    assert calls == [(HUB[name].path, HUB[name].name, {"split": split, "streaming": True})]
    assert [question.text[-4:] for question in questions] == ["do 0", "do 1"]
    assert [question.answer for question in questions] == (["0", "1"] if HUB[name].answer else [None, None])
    assert ("Python function" in questions[0].text) == (name in ("humaneval", "mbpp"))


def test_unreachable_hub_gives_a_one_line_error(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load_dataset(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach\nthe hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match=r"gsm8k.*Couldn't reach the hub.*local \.jsonl"):
        load_questions("gsm8k", 2)
