"""Questions and answers as a language model with ``<think>`` reads them."""

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

#: A label that no loss counts.
IGNORED = -100


def reasoning_text(question: str, answer: str, *, think: bool = True) -> Passage:
    """``Question: {question}``, a line break, and ``Answer: <think> {answer}``, the two being text."""
    tag = (THINK, " ") if think else ()
    return joined("Question: ", text(question), "\nAnswer: ", *tag, text(answer))


class ReasoningDataset(Dataset[dict[str, Tensor]]):
    """Tokenised questions and answers, padded to one length.

    Args:
        data: Items with ``question`` and ``answer``; an answer may be empty.
        tokenizer: Has a padding token.
        max_length: Tokens of every item; longer ones are cut at the end. An end token that the tokenizer adds
            stands behind whole answers alone.
        add_think_token: Whether ``<think>`` stands before the answer.

    Raises:
        InputError: An item without one of the two, or a tokenizer that cannot pad.
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
        begun, ended = surroundings(self.tokenizer)
        whole = begun + encode(self.tokenizer, [passage])[0]
        if answer and len(whole) + len(ended) <= self.max_length:
            whole += ended
        padded = self.tokenizer.pad(
            {"input_ids": whole[: self.max_length]}, padding="max_length", max_length=self.max_length
        )
        ids, mask = torch.tensor(padded["input_ids"]), torch.tensor(padded["attention_mask"])
        # By the mask, not by the id: a tokenizer may pad with its end token.
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED)}


def create_sample_dataset() -> list[dict[str, str]]:
    """Ten word problems with their answers, for trying things out."""
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
