"""Loads questions for a language model to think about."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count as count_up
from itertools import islice
from pathlib import Path
from typing import Any

from llm_trm.data.arithmetic import Split, World
from llm_trm.data.tags import END_THINK, THINK
from llm_trm.errors import InputError, listed, one_line
from llm_trm.extras import require
from llm_trm.memory import require_memory
from llm_trm.ranges import shown
from llm_trm.text import parse_json, read_lines, read_text

ARITHMETIC = "arithmetic"
#: Lower bound of the memory of a :class:`Question` with one operation; 460 were measured for up to five.
_BYTES_PER_PROBLEM = 350
#: Columns of a local file; the first one present is used.
QUESTION_COLUMNS = ("question", "problem", "Problem", "Question", "prompt", "text")
ANSWER_COLUMNS = ("answer", "Answer", "solution")


@dataclass(frozen=True)
class Question:
    """One problem.

    Attributes:
        text: The question as the model gets it.
        answer: The reference answer or worked solution; None if there is none to compare with.
        record: The record that the question comes from, with all its other fields.
    """

    text: str
    answer: str | None
    record: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class HubDataset:
    """A data set on the Hugging Face hub, in a format that needs no loading script.

    Attributes:
        path, name: Arguments of ``datasets.load_dataset``.
        question, answer: Columns. Programming tasks have no answer to compare with.
        splits: The data set's split for each of our splits.
        prompt: Format string for the question column.
    """

    path: str
    name: str | None
    question: str
    answer: str | None
    splits: Mapping[str, str]
    prompt: str = "{}"


_BOTH = {"train": "train", "test": "test"}
HUB = {
    "gsm8k": HubDataset("openai/gsm8k", "main", "question", "answer", _BOTH),
    "math": HubDataset("DigitalLearningGmbH/MATH-lighteval", "default", "problem", "solution", _BOTH),
    "aime": HubDataset("qq8933/AIME_1983_2024", None, "Question", "Answer", {"train": "train"}),
    "humaneval": HubDataset(
        "openai/openai_humaneval",
        None,
        "prompt",
        None,
        {"test": "test"},
        "Complete this Python function:\n\n{}",
    ),
    "mbpp": HubDataset(
        "google-research-datasets/mbpp",
        "full",
        "text",
        None,
        _BOTH,
        "Write a Python function that does the following:\n\n{}",
    ),
    # The rows of codeparrot/apps, whose loading script datasets 4 no longer runs.
    "apps": HubDataset("metr-evals/apps", None, "question", None, _BOTH),
}


def load_questions(
    dataset: str, count: int, *, split: Split = "train", seed: int = 0, world: World | None = None
) -> list[Question]:
    """Load the first ``count`` questions of a data set or mixture; question i is the same in every run.

    A mixture alternates between its sources in equal parts: one question of the first, one of the second, and
    so on. If ``count`` does not divide evenly, the first sources contribute one more. A source with fewer
    questions than its part contributes all of them.

    Args:
        dataset: ``arithmetic``, a key of :data:`HUB`, a ``.jsonl`` or ``.json`` file, or several of these,
            separated by commas.
        split: Split of the arithmetic world and of hub data sets. Data sets with a single split use that.
        seed, world: Settings of the arithmetic world.

    Raises:
        InputError: A data set is unknown, empty or cannot be loaded, or a record has no question.
    """
    names = [name.strip() for name in dataset.split(",") if name.strip()]
    if not names:
        raise InputError(f"--data {shown(dataset)} is empty: use {_choices()}")
    if ARITHMETIC in names:  # infinite
        require_problems(count // len(names))
    sources = [_source(name, split, seed, world or World()) for name in names]
    shares = [count // len(names) + (place < count % len(names)) for place in range(len(names))]
    drawn = [list(islice(source, share)) for source, share in zip(sources, shares, strict=True)]
    if count and not any(drawn):
        raise InputError(f"--data {one_line(dataset)} has no problems: choose another data set")
    turns = max(map(len, drawn))
    return [questions[turn] for turn in range(turns) for questions in drawn if turn < len(questions)]


def located(dataset: str) -> str:
    """The ``dataset`` argument of :func:`load_questions` with absolute paths, to use from another folder."""
    names = [name.strip() for name in dataset.split(",")]
    return ",".join(str(Path(name).resolve()) if is_file(name) else name for name in names)


def is_file(name: str) -> bool:
    """Whether ``name`` is a file of records, rather than a data set on the hub."""
    return name.lower().endswith((".jsonl", ".json"))


def require_problems(count: int) -> None:
    """Raise InputError if ``count`` problems of the arithmetic world cannot fit into memory."""
    require_memory(_BYTES_PER_PROBLEM * count, f"{count:,} problems", "use fewer problems or steps")


def _choices() -> str:
    return f"{ARITHMETIC}, {', '.join(HUB)}, or a file that ends in .jsonl or .json"


def _source(name: str, split: Split, seed: int, world: World) -> Iterator[Question]:
    if name == ARITHMETIC:
        problems = (world.problem(split, seed, index) for index in count_up())
        return (Question(problem.question, problem.answer, problem.record()) for problem in problems)
    if name in HUB:
        return _hub(name, HUB[name], split)
    if is_file(name):
        return read_questions(Path(name))
    raise InputError(f"--data {shown(name)} is unknown: use {_choices()}")


def _hub(name: str, source: HubDataset, split: Split) -> Iterator[Question]:
    require("train", "datasets")
    import datasets

    theirs = source.splits.get(split) or next(iter(source.splits.values()))
    try:
        for row in datasets.load_dataset(source.path, source.name, split=theirs, streaming=True):
            answer = None if source.answer is None else str(row[source.answer])
            yield Question(source.prompt.format(row[source.question]), answer, dict(row))
    # No common base: the hub's client raises errors of datasets, huggingface_hub, httpx and fsspec.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"--data {name}: {source.path} cannot be loaded from the hub ({reason[:200]}): check the "
            "network, or name a local .jsonl file with the columns question and answer"
        ) from error


def read_questions(path: Path) -> Iterator[Question]:
    """Yield the questions of a ``.jsonl`` file, or of a ``.json`` file with an array.

    Raises:
        InputError: The file cannot be read, or has a record without a question.
    """
    for place, record in read_records(path):
        yield _question(place, record)


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the location and content of each object in a ``.jsonl`` file, or in a ``.json`` file's array.

    Raises:
        InputError: The file cannot be read, or one of its records is not an object.
    """
    read = _json_lines if path.suffix.lower() == ".jsonl" else _json_array
    for place, record in read(path):
        if not isinstance(record, dict):
            raise InputError(
                f"{path}, {place}: not a JSON object: write one object with a question per record"
            )
        yield f"{path}, {place}", record


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        for number, line in enumerate(read_lines(path), 1):
            if line.strip():
                yield f"line {number}", _parsed(f"{path}, line {number}", line)
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def _json_array(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        records = _parsed(str(path), read_text(path))
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(records, list):
        raise InputError(f"{path} is not a JSON array of objects: write one, or use JSON lines (.jsonl)")
    for number, record in enumerate(records, 1):
        yield f"record {number}", record


def _unreadable(path: Path, error: Exception) -> InputError:
    reason = error.strerror if isinstance(error, OSError) else error
    return InputError(f"{path} cannot be read ({reason}): name a JSON file in UTF-8")


def _parsed(place: str, text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise InputError(f"{place}: not JSON ({error}): fix the file") from error


def _question(place: str, record: dict[str, Any]) -> Question:
    column = next((name for name in QUESTION_COLUMNS if name in record), None)
    if column is None:
        raise InputError(
            f"{place}: no question among the columns {listed(map(repr, record)) or '(none)'}: rename one "
            f"of them to {' or '.join(QUESTION_COLUMNS)}"
        )
    text = record[column]
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{place}: {column!r} is {shown(text)}, not text: fix the file")
    answer = first_text(place, record, ANSWER_COLUMNS)
    require_untagged(place, "answer", answer or "")
    return Question(text, answer, record)


def first_text(place: str, record: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The text of the first of the columns ``names`` that is present and not null; None if there is none.

    Raises:
        InputError: The value is neither text nor a finite number; the message starts with ``place``.
    """
    for name in names:
        value = record.get(name)
        if value is None:
            continue
        if isinstance(value, (dict, list)):
            raise InputError(f"{place}: {name!r} is a {type(value).__name__}, not text: fix the row")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        # A whole number may be too large for a float, but never infinite.
        finite = number and (isinstance(value, int) or math.isfinite(value))
        if not isinstance(value, str) and not finite:
            raise InputError(
                f"{place}: {name!r} is {shown(value)}, neither text nor a finite number: fix the row"
            )
        return str(value)
    return None


def require_untagged(place: str, what: str, value: str) -> None:
    """Reject an answer or reasoning that contains thinking tags, which are added around it later.

    Raises:
        InputError: ``value`` contains a tag.
    """
    if tag := next((tag for tag in (THINK, END_THINK) if tag in value), None):
        raise InputError(
            f"{place}: the {what} contains {tag}: move the reasoning, without the tags, to a column "
            "thinking, keep only the answer in the answer column, or remove the row"
        )
