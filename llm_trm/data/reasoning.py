"""Formats and tokenises questions and answers for a language model with ``<think>``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from llm_trm.data.passages import Passage, encode, joined, surroundings, text
from llm_trm.data.tags import THINK
from llm_trm.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Label that losses ignore.
IGNORED = -100


def reasoning_text(question: str, answer: str, *, think: bool = True) -> Passage:
    """``Question: {question}``, a line break, and ``Answer: <think> {answer}``; both values are text."""
    tag = (THINK, " ") if think else ()
    return joined("Question: ", text(question), "\nAnswer: ", *tag, text(answer))


class ReasoningDataset(Dataset[dict[str, Tensor]]):
    """Tokenised questions and answers, padded to one length.

    Args:
        data: Items with ``question`` and ``answer``; an answer may be empty.
        tokenizer: A tokenizer with a padding token.
        max_length: Length of every item in tokens. Longer items are truncated at the end. If the tokenizer
            adds an end token, only complete answers get it.
        add_think_token: Whether to put ``<think>`` before the answer.

    Raises:
        InputError: An item lacks a question or an answer, or the tokenizer has no padding token.
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int = 512,
        add_think_token: bool = True,
    ) -> None:
        for number, item in enumerate(data):
            if missing := {"question", "answer"} - item.keys():
                raise InputError(f"item {number} has no {' and no '.join(sorted(missing))}")
        if tokenizer.pad_token_id is None:
            raise InputError("this tokenizer has no padding token: set tokenizer.pad_token")
        self.data, self.tokenizer = data, tokenizer
        self.max_length, self.add_think_token = max_length, add_think_token

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask``, ``labels``: int64 [max_length]; labels of padding are -100."""
        item = self.data[index]
        answer = str(item["answer"])
        passage = reasoning_text(str(item["question"]), answer, think=self.add_think_token)
        prefix, suffix = surroundings(self.tokenizer)
        whole = prefix + encode(self.tokenizer, [passage])[0]
        if answer and len(whole) + len(suffix) <= self.max_length:
            whole += suffix
        padded = self.tokenizer.pad(
            {"input_ids": whole[: self.max_length]}, padding="max_length", max_length=self.max_length
        )
        ids, mask = torch.tensor(padded["input_ids"]), torch.tensor(padded["attention_mask"])
        # Use the mask, not the id: a tokenizer may pad with its end token.
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED)}


def create_sample_dataset() -> list[dict[str, str]]:
    """Ten word problems with answers, for experiments."""
    return [
        {"question": "A crate holds 18 jars. How many jars do 7 crates hold?", "answer": "126"},
        {"question": "What is 92 minus 47?", "answer": "45"},
        {
            "question": "A train leaves at 9:40 and takes 85 minutes. When does it arrive?",
            "answer": "11:05",
        },
        {"question": "Share 144 plums among 9 people. How many does each get?", "answer": "16"},
        {"question": "What is the sum of 308, 77 and 15?", "answer": "400"},
        {"question": "A garden is 12 m by 7 m. How long is the fence around it, in metres?", "answer": "38"},
        {"question": "Which number times itself is 169?", "answer": "13"},
        {
            "question": "A coat of 80 euros is reduced by 15 percent. What does it cost now?",
            "answer": "68",
        },
        {"question": "What is the remainder of 100 divided by 7?", "answer": "2"},
        {"question": "Three pens cost 4.50 euros. What do eight pens cost, in euros?", "answer": "12"},
    ]
