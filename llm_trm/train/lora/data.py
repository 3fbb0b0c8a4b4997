"""Solved questions as token sequences for a language model that recurs at ``<think>``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from llm_trm.choices import PromptForm
from llm_trm.data.lessons import (
    answer_at_once,
    answer_tail,
    encode_each,
    opens_thought,
    question_prompt,
    response,
)
from llm_trm.data.passages import encode
from llm_trm.data.questions import Solved
from llm_trm.data.reasoning import IGNORED
from llm_trm.data.tags import THINK
from llm_trm.errors import InputError
from llm_trm.ranges import shown
from llm_trm.train.lora.curriculum import thinking_left

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Lesson = dict[str, Any]


class Lessons(Dataset[Lesson]):
    """Lesson ``stage * len(solved) + index`` is question ``index``, as written in a stage of the curriculum.

    A lesson has ``input_ids`` and ``labels``, -100 at the question; ``answer_at``, the position of the token
    before the first one of the answer; and, with ``teacher``, ``teacher_ids`` and ``teacher_at``: the same
    with all of the thinking written, empty if there is none.

    Args:
        solved: The questions.
        tokenizer: The model's.
        form: How questions are put.
        stages: The curriculum's last stage, in which no thinking is written.
        teacher: Whether lessons have the fields of the teacher.

    Raises:
        InputError: A question to be answered at once, although every prompt ends in ``<think>``.
    """

    def __init__(
        self,
        solved: Sequence[Solved],
        tokenizer: PreTrainedTokenizerBase,
        form: PromptForm,
        *,
        stages: int = 0,
        teacher: bool = False,
    ) -> None:
        self.solved, self._tokenizer, self._form, self._stages = list(solved), tokenizer, form, stages
        self._teacher = teacher
        at_once = next((row for row in self.solved if not row.thinks), None)
        if at_once is not None and opens_thought(tokenizer, form):
            raise InputError(
                f"the chat template ends every prompt in {THINK}, and the question "
                f"{shown(at_once.question)} has think false: remove such rows, or choose "
                "--prompt-form plain"
            )
        prompts = [question_prompt(tokenizer, row.question, form) for row in self.solved]
        self._asked = encode_each(tokenizer, prompts, form)
        self._tails: list[list[int]] | None = None
        self._said: dict[int | None, list[tuple[list[int], int]]] = {}

    def __len__(self) -> int:
        return len(self.solved)

    def __getitem__(self, key: int) -> Lesson:
        stage, index = divmod(key, len(self.solved))
        asked, (said, before) = self._asked[index], self._written(stage)[index]
        lesson: Lesson = {
            "input_ids": asked + said,
            "labels": [IGNORED] * len(asked) + said,
            "answer_at": len(asked) + before - 1,
        }
        if self._teacher:
            said, before = self._written(None)[index]
            lesson["teacher_ids"] = asked + said if said else []
            lesson["teacher_at"] = len(asked) + before - 1
        return lesson

    @property
    def thinking(self) -> int:
        """Number of questions with written thinking."""
        return sum(row.thinks and bool(row.thinking) for row in self.solved)

    def longest(self, index: int) -> int:
        """The largest number of tokens of question ``index`` in any stage."""
        stages: list[int | None] = [0, None] if self._teacher else [0]
        return len(self._asked[index]) + max(len(self._written(stage)[index][0]) for stage in stages)

    def kept(self, indices: Sequence[int]) -> Lessons:
        """The lessons of the questions ``indices``."""
        lessons = Lessons((), self._tokenizer, self._form, stages=self._stages, teacher=self._teacher)
        lessons.solved = [self.solved[index] for index in indices]
        lessons._asked = [self._asked[index] for index in indices]
        lessons._said = {stage: [rows[index] for index in indices] for stage, rows in self._said.items()}
        return lessons

    def _written(self, stage: int | None) -> list[tuple[list[int], int]]:
        """The tokens to write for each question, and how many of them are before the answer.

        Stage None is the teacher's: all of the thinking, or no tokens if there is none.
        """
        if stage not in self._said:
            texts = [self._text(row, stage) for row in self.solved]
            if self._tails is None:
                tails = [answer_tail(self._tokenizer, row.answer, self._form) for row in self.solved]
                self._tails = encode(self._tokenizer, tails)
            # Without thinking, all is answer, even if its first token lacks the space that the tail has.
            self._said[stage] = [
                (whole, len(whole) - _common_end(whole, tail) if row.thinks else 0)
                for row, whole, tail in zip(
                    self.solved, encode(self._tokenizer, texts), self._tails, strict=True
                )
            ]
        return self._said[stage]

    def _text(self, row: Solved, stage: int | None) -> str:
        if stage is None and not (row.thinks and row.thinking):
            return ""
        if not row.thinks:
            return answer_at_once(self._tokenizer, row.answer)
        left = row.thinking if stage is None else thinking_left(row.thinking, stage, self._stages)
        return response(self._tokenizer, row.answer, self._form, thinking=left)


def _common_end(whole: list[int], tail: list[int]) -> int:
    """Length of the longest common suffix."""
    for count, (one, other) in enumerate(zip(reversed(whole), reversed(tail), strict=False)):
        if one != other:
            return count
    return min(len(whole), len(tail))


class Collator:
    """Lessons of a batch as tensors, padded on the right.

    Args:
        pad: Id of the padding token.
    """

    def __init__(self, pad: int) -> None:
        self._pad = pad

    def __call__(self, lessons: Sequence[Lesson]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask``, ``labels`` [B, L] and ``answer_at`` [B].

        For samples with a teacher, also ``teacher_ids``, ``teacher_mask`` [R, L'], ``teacher_at`` [R], and
        their indices in the batch, ``taught`` [R].
        """
        ids, mask = _padded([lesson["input_ids"] for lesson in lessons], self._pad)
        batch = {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": _padded([lesson["labels"] for lesson in lessons], IGNORED)[0],
            "answer_at": torch.tensor([lesson["answer_at"] for lesson in lessons]),
        }
        taught = [place for place, lesson in enumerate(lessons) if lesson.get("teacher_ids")]
        if taught:
            teachers = [lessons[place] for place in taught]
            ids, mask = _padded([lesson["teacher_ids"] for lesson in teachers], self._pad)
            batch |= {
                "teacher_ids": ids,
                "teacher_mask": mask,
                "teacher_at": torch.tensor([lesson["teacher_at"] for lesson in teachers]),
                "taught": torch.tensor(taught),
            }
        return batch


def _padded(rows: Sequence[Sequence[int]], filler: int) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    filled = torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return filled, (torch.arange(longest) < lengths[:, None]).long()
