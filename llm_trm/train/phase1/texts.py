"""Texts for a language model to read, from files, chats, solved problems or hub datasets, as tokens."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_trm.data.arithmetic import World
from llm_trm.data.folders import data_files
from llm_trm.data.lessons import answer_at_once, opens_thought
from llm_trm.data.passages import Passage, control_tokens, encode, joined, surroundings, text
from llm_trm.data.tags import END_THINK, THINK
from llm_trm.data.templates import rendered_chat
from llm_trm.errors import InputError, listed, one_line
from llm_trm.extras import require
from llm_trm.models.loading import ThinkingModel
from llm_trm.ranges import shown
from llm_trm.text import parse_json, read_lines

_QUESTION = ("question", "problem")
#: The model's response comes before the reference answer: pair files have both.
_ANSWER = ("response", "answer", "solution")
_SPEAKERS = {"human": "user", "gpt": "assistant"}


def read_texts(source: str, model: ThinkingModel, *, thinking: bool) -> Iterator[str]:
    """The texts of ``source``, one after another.

    Args:
        source: A ``.txt`` file with texts separated by blank lines; a ``.jsonl`` file, or a folder of them;
            or a dataset on the hub, ``NAME`` or ``NAME:SUBSET``, streamed from its training split. A record
            is a text if it has ``text`` or ``content``; a chat if it has ``messages`` or ``conversations``;
            a solved problem if it has ``question`` or ``problem``, optionally ``thinking``, and ``answer``,
            ``response`` or ``solution``.
        model: Its chat template is applied to chats and problems.
        thinking: Whether problems must include their thinking.

    Raises:
        InputError: A source that does not exist or cannot be read, or a record without these columns.
    """
    path = Path(source)
    records: Iterable[tuple[str, Any]]
    if path.is_dir():
        files = data_files(path, ".jsonl")
        if not files:
            raise InputError(f"{path} contains no .jsonl file: name a folder or a file of records")
        records = chain.from_iterable(map(_json_lines, files))
    elif path.suffix.lower() == ".txt":
        yield from _paragraphs(path)
        return
    elif path.suffix.lower() == ".jsonl":
        records = _json_lines(path)
    elif path.exists():
        raise InputError(f"{path} is neither .txt nor .jsonl: convert it to one of them")
    else:
        records = _hub_records(source)
    for where, record in records:
        yield _text_of(record, where, model, thinking)


def arithmetic_texts(model: ThinkingModel, seed: int, *, thinking: bool) -> Iterator[str]:
    """An endless sequence of solved training problems of the arithmetic world, with or without traces."""
    world, index = World(), 0
    while True:
        problem = world.problem("train", seed, index)
        trace = problem.thinking if thinking else None
        yield solved_text(model, problem.question, trace, problem.answer)
        index += 1


def solved_text(model: ThinkingModel, question: str, thinking: str | None, answer: str) -> Passage:
    """The chat in which ``model`` is asked ``question`` and answers, after ``thinking`` if there is any.

    All three are plain text, even if they spell out special tokens.
    """
    prompt = model.prompt(question, thinking=thinking is not None)
    opened = "" if opens_thought(model.tokenizer, "chat") else THINK
    trace = () if thinking is None else (opened, text(thinking), END_THINK)
    return joined(prompt, *trace, answer_at_once(model.tokenizer, answer))


def tokenised(
    texts: Iterable[str],
    model: ThinkingModel,
    *,
    max_length: int,
    num_tokens: int,
    held_out: float,
    source: str,
) -> tuple[list[Tensor], list[Tensor]]:
    """The tokens of ``texts`` in pieces, split into training and validation.

    A hash of the text decides, so that equal texts are on the same side and the split depends on no seed.

    Args:
        texts: Read until there are ``num_tokens`` tokens.
        max_length: Maximum length of a piece in tokens; a longer text makes several pieces.
        held_out: Fraction of the distinct texts to validate on, in (0, 1); at least one text.
        source: Where the texts come from, for messages.

    Returns:
        Training and validation pieces, int32 [length] each, in the order of the texts.

    Raises:
        InputError: Fewer than two distinct texts.
    """
    bos = model.tokenizer.bos_token
    pieces: list[tuple[bytes, Tensor]] = []
    total = 0
    for source_text in texts:
        (ids,) = encode(model.tokenizer, [source_text])
        # A chat template has already written, or left out, the token that starts a text.
        chat = isinstance(source_text, Passage) or (bool(bos) and source_text.startswith(str(bos)))
        if not chat:
            ids = surroundings(model.tokenizer)[0] + ids
        tokens = torch.tensor(ids[: num_tokens - total], dtype=torch.int32)
        key = hashlib.sha256(source_text.encode()).digest()
        pieces += [(key, piece) for piece in tokens.split(max_length) if len(piece)]
        total += len(tokens)
        if total >= num_tokens:
            break
    keys = sorted({key for key, _ in pieces})
    if len(keys) < 2:
        raise InputError(
            f"{source} contains {'one text' if keys else 'no text'}: at least two different ones are needed, "
            "one to train on and one to validate on"
        )
    validation = set(keys[: min(math.ceil(held_out * len(keys)), len(keys) - 1)])
    return (
        [piece for key, piece in pieces if key not in validation],
        [piece for key, piece in pieces if key in validation],
    )


def _paragraphs(path: Path) -> Iterator[str]:
    block: list[str] = []
    for line in _lines(path):
        if line.strip():
            block.append(line)
        elif block:
            yield "\n".join(block).strip()
            block = []
    if block:
        yield "\n".join(block).strip()


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            yield f"{path} line {number}", parse_json(line)
        except ValueError as error:
            raise InputError(
                f"{path} line {number} is not JSON ({one_line(error)}): correct or remove the line"
            ) from error


def _lines(path: Path) -> Iterator[str]:
    try:
        yield from read_lines(path)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: name a .txt or .jsonl file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason}): convert it") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): name another file") from error


def _hub_records(source: str) -> Iterator[tuple[str, Any]]:
    require("train", "datasets")
    from datasets import load_dataset

    name, _, subset = source.partition(":")
    try:
        for number, record in enumerate(load_dataset(name, subset or None, split="train", streaming=True), 1):
            yield f"{source} record {number}", record
    # No common base: the hub's client raises errors of datasets, huggingface_hub, httpx and fsspec.
    except Exception as error:
        raise InputError(
            f"{source} cannot be loaded ({one_line(error)}): name a .txt or .jsonl file, or a dataset on the "
            "hub as NAME or NAME:SUBSET"
        ) from error


def _text_of(record: Any, where: str, model: ThinkingModel, thinking: bool) -> str:
    if not isinstance(record, Mapping):
        raise InputError(f"{where} is not a JSON object: write one JSON object with named columns per line")
    for name in ("messages", "conversations"):
        if isinstance(record.get(name), list):
            return _chat(record[name], where, model)
    question, answer = _first(record, _QUESTION), _first(record, _ANSWER)
    trace = record.get("thinking")
    if question is not None and (answer is not None or isinstance(trace, str)):
        if thinking and not isinstance(trace, str):
            raise InputError(f'{where} has no "thinking": stage 1b needs the worked trace of every problem')
        return solved_text(model, question, trace if thinking else None, answer or "")
    whole = _first(record, ("text", "content"))
    if whole is None:
        raise InputError(
            f"{where} has the columns {listed(map(repr, record)) or '(none)'}: expected are 'text', or "
            f"'messages', or 'question' and 'answer'{' and thinking' * thinking}"
        )
    return whole


def _first(record: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    return next((record[name] for name in names if isinstance(record.get(name), str) and record[name]), None)


def _chat(turns: list[Any], where: str, model: ThinkingModel) -> str:
    try:
        messages = [
            {"role": turn["role"], "content": turn["content"]}
            if "role" in turn
            else {"role": _SPEAKERS.get(turn["from"], turn["from"]), "content": turn["value"]}
            for turn in turns
        ]
    except (KeyError, TypeError):
        raise InputError(
            f'{where}: the turns of a chat need "role" and "content", or "from" and "value"'
        ) from None
    for message in messages:
        # Some templates accept lists of parts, or null for a turn that only calls a tool.
        for name, kinds in (("role", str), ("content", (str, list, type(None)))):
            if not isinstance(message[name], kinds):
                wrong = shown(message[name])
                raise InputError(f"{where}: the {name} of a turn is {wrong}, not text: fix the record")
    rendered = rendered_chat(model.tokenizer, messages, where)
    return Passage(rendered, _said_by_others(rendered, messages, where, model))


def _said_by_others(
    rendered: str, messages: list[dict[str, Any]], where: str, model: ThinkingModel
) -> tuple[tuple[int, int], ...]:
    """Spans of a rendered chat that others than the model wrote: plain text. Its own turns have the tags."""
    names = control_tokens(model.tokenizer).values()
    texts, place = [], 0
    for message in messages:
        said, own = message["content"], message["role"] == "assistant"
        if not isinstance(said, str) or not (said := said.strip()):
            continue
        found = rendered.find(said, place)
        if found >= 0:
            place = found + len(said)
            texts += [] if own else [(found, place)]
        elif not own and any(name in said for name in names):
            raise InputError(
                f"{where}: {shown(said)} names a special token, and the chat template changes the text: "
                "remove the record, or reword it"
            )
    return tuple(texts)
