"""Loads questions with answers and reasoning to train a language model on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_trm.data.problems import (
    ANSWER_COLUMNS,
    HUB,
    QUESTION_COLUMNS,
    first_text,
    is_file,
    read_records,
    require_untagged,
)
from llm_trm.errors import InputError, listed, one_line
from llm_trm.extras import require
from llm_trm.ranges import shown

#: Columns of written reasoning; the first one present is used.
THINKING_COLUMNS = ("thinking", "reasoning")
#: Separates reasoning and answer in a combined text, as in GSM8K.
_MARK = "####"


@dataclass(frozen=True)
class Solved:
    """A question with its answer.

    Attributes:
        question: The question.
        answer: The reference answer; may be empty.
        thinking: Written reasoning that leads to the answer; may be empty.
        thinks: Whether the model should think before it answers.
    """

    question: str
    answer: str
    thinking: str = ""
    thinks: bool = True


def fingerprint(questions: Iterable[tuple[object, ...]]) -> str:
    """SHA-256 of questions in order, to detect a file that changed under the same name."""
    digest = hashlib.sha256()
    for known in questions:
        digest.update(json.dumps(known).encode() + b"\n")
    return digest.hexdigest()


def load_solved(source: str, *, split: str = "train", whole_answers: bool = False) -> list[Solved]:
    """Load a whole data set.

    Args:
        source: A ``.jsonl`` file, a ``.json`` file with a list, ``gsm8k``, ``math``, or the name of a data
            set on the Hugging Face hub, optionally followed by a colon and the name of a configuration. Each
            row has a question and an answer (columns :data:`~llm_trm.data.problems.QUESTION_COLUMNS`,
            :data:`~llm_trm.data.problems.ANSWER_COLUMNS`). It may also have written reasoning
            (:data:`THINKING_COLUMNS`) and ``think``, which is false if the model should answer at once.
        split: Split of a data set on the hub.
        whole_answers: Keep the text before ``####`` in the answer. By default it becomes the reasoning.

    Raises:
        InputError: The data set is missing or empty, a row lacks a question or an answer, or an answer or
            reasoning contains thinking tags.
    """
    rows = read_records(Path(source)) if is_file(source) else _hub_rows(source, split)
    found = [_solved(place, row, whole_answers) for place, row in rows]
    if not found:
        raise InputError(f"{source} is empty: it needs rows with a question and an answer")
    return found


def _hub_rows(source: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    known = HUB.get(source)
    if known is not None:
        if known.answer is None:
            raise InputError(f"{source} has no answers to learn: choose another data set")
        path, name = known.path, known.name
        split = known.splits.get(split) or next(iter(known.splits.values()))
    else:
        path, _, configuration = source.partition(":")
        name = configuration or None
        if path.count("/") != 1 or path.startswith((".", "/")):
            raise InputError(
                f"{source} is neither a file that ends in .jsonl or .json, nor {', '.join(HUB)}, nor a data "
                "set on the hub (owner/name): check the name"
            )
    require("train", "datasets")
    import datasets

    try:
        rows: Iterable[dict[str, Any]] = datasets.load_dataset(path, name, split=split)
    # No common base: the hub's client raises errors of datasets, huggingface_hub, httpx and fsspec.
    except Exception as error:
        raise InputError(
            f"{source} cannot be loaded from the hub ({type(error).__name__}: {one_line(error)}): check the "
            "name and the network, or name a local .jsonl file with the columns question and answer"
        ) from error
    for number, row in enumerate(rows, 1):
        if known is not None:
            row = {"question": known.prompt.format(row[known.question]), "answer": row[str(known.answer)]}
        yield f"{source}, row {number}", row


def _solved(place: str, row: dict[str, Any], whole_answers: bool) -> Solved:
    question = _column(place, row, QUESTION_COLUMNS, "question")
    answer = _column(place, row, ANSWER_COLUMNS, "answer")
    if not question.strip():
        raise InputError(f"{place}: the question is empty: fix or remove the row")
    thinking = first_text(place, row, THINKING_COLUMNS)
    if thinking is None and not whole_answers and _MARK in answer:
        thinking, _, answer = answer.rpartition(_MARK)
        thinking, answer = thinking.strip(), answer.strip()
    require_untagged(place, "answer", answer)
    require_untagged(place, "thinking", thinking or "")
    thinks = row.get("think", True)
    if not isinstance(thinks, bool):
        raise InputError(f"{place}: think is {shown(thinks)}: write true or false")
    return Solved(question, answer, thinking or "", thinks)


def _column(place: str, row: dict[str, Any], names: tuple[str, ...], what: str) -> str:
    if (text := first_text(place, row, names)) is not None:
        return text
    raise InputError(
        f"{place}: no {what} among the columns {listed(map(repr, row)) or '(none)'}: rename one of them "
        f"to {' or '.join(names)}"
    )
