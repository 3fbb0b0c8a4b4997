"""Runs a language model in thinking mode on problems, and stores its states before and after thinking."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llm_trm.claims import claimed
from llm_trm.data.decoding import Outcome, Thought, ThoughtDecoder
from llm_trm.data.generation_config import DataGenConfig
from llm_trm.data.grading import is_correct
from llm_trm.data.pairs import (
    DTYPES,
    Pair,
    PairFiles,
    damaged_shards,
    open_pairs,
    summarize_shard,
    write_index,
    write_shard,
)
from llm_trm.data.problems import Question, load_questions
from llm_trm.data.processes import Processes, launched_processes
from llm_trm.data.resume import check_settings, start
from llm_trm.device import resolve_device
from llm_trm.errors import InputError
from llm_trm.files import require_writable
from llm_trm.models.loading import ThinkingModel, load_thinking_model, require_padding
from llm_trm.settings import settings_of

_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


@dataclass
class GenerationProgress:
    """Progress of one process.

    Attributes:
        total: Number of problems in this process's shards.
        resumed: Number of problems in shards that already existed.
        pairs: Number of problems that yielded a pair.
        failures: Number of problems that failed, by reason.
        batch_size: Problems per batch; less than requested after memory ran out.
    """

    total: int = 0
    resumed: int = 0
    pairs: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    batch_size: int = 0

    @property
    def done(self) -> int:
        """Number of finished problems."""
        return self.resumed + self.pairs + self.failures.total()


class ThinkingDataGenerator:
    """Generates pairs of hidden states for phase 2, and resumes after an interruption.

    Under ``accelerate launch`` with P processes, process r generates the shards r, r + P, r + 2 P and so on.
    A shard depends only on the settings. Batch size and device change its states only by rounding errors.

    Args:
        config: Settings.
        model: A model to use instead of loading ``config.model``; already on its device.
        on_progress: Called with this process's progress after every problem.

    Attributes:
        started: Whether the folder has the settings of this run, so that the next one can continue it.
    """

    def __init__(
        self,
        config: DataGenConfig,
        *,
        model: ThinkingModel | None = None,
        on_progress: Callable[[GenerationProgress], None] = lambda _: None,
    ) -> None:
        self.config = config
        self._model = model
        self._on_progress = on_progress
        self.started = False

    def run(self) -> PairFiles:
        """Generate the missing shards and write the index.

        Raises:
            InputError: The folder is not writable, has pairs with other settings or is in use by another
                run, or the model or data set cannot be loaded.
        """
        config, processes = self.config, launched_processes()
        questions = load_questions(
            config.data,
            config.num_samples,
            split=config.split,
            seed=config.sampling.seed,
            world=config.world,
        )
        dtype = self._dtype()
        settings = _settings(config, questions, dtype)
        folder = require_writable(config.output)
        with claimed(folder, main=processes.is_main):
            return self._run(questions, dtype, settings, processes)

    def _run(
        self, questions: list[Question], dtype: str, settings: dict[str, Any], processes: Processes
    ) -> PairFiles:
        config, folder = self.config, self.config.output
        if processes.is_main:
            check_settings(folder, settings, overwrite=config.overwrite)
        shards = range(-(-len(questions) // config.shard_size))
        mine = shards[processes.index :: processes.count]
        damaged = set() if config.overwrite else damaged_shards(folder, mine)
        missing = [
            number
            for number in mine
            if config.overwrite or number in damaged or summarize_shard(folder, number) is None
        ]
        maker = None
        if missing:
            # Load the model before removing anything, so that a failure to load loses no pairs.
            model = self._model or load_thinking_model(
                config.model,
                processes.place(resolve_device(config.device)),
                trust_remote_code=config.trust_remote_code,
            )
            require_padding(model.name, model.tokenizer)
            maker = _ShardMaker(config, model, questions, dtype)
            maker.check(missing)
        if processes.is_main:
            start(folder, settings, overwrite=config.overwrite)
        processes.wait()
        self.started = True
        if maker is not None:
            self._generate(maker, mine, missing)
        processes.wait()
        if processes.is_main:
            write_index(folder, len(shards), model=config.model, seed=config.sampling.seed, settings=settings)
        processes.wait()
        return open_pairs(folder)

    def _dtype(self) -> str:
        if self.config.dtype is not None:
            name = _DTYPES[self.config.dtype]
        elif self._model is not None:
            name = str(self._model.model.dtype).removeprefix("torch.")
        else:  # the defaults of load_thinking_model
            name = "bfloat16" if resolve_device(self.config.device).type == "cuda" else "float32"
        if name not in DTYPES:
            raise InputError(f"states cannot be stored as {name}: use {' or '.join(DTYPES)}")
        return name

    def _generate(self, maker: _ShardMaker, mine: range, missing: list[int]) -> None:
        progress = GenerationProgress(
            total=sum(len(maker.problems(number)) for number in mine),
            resumed=sum(len(maker.problems(number)) for number in mine if number not in missing),
            batch_size=self.config.batch_size,
        )

        def report(outcome: Outcome) -> None:
            if isinstance(outcome, Thought):
                progress.pairs += 1
            else:
                progress.failures[outcome] += 1
            progress.batch_size = maker.batch_size
            self._on_progress(progress)

        self._on_progress(progress)
        for number in missing:
            maker.make(number, report)


def _settings(config: DataGenConfig, questions: list[Question], dtype: str) -> dict[str, Any]:
    """All settings that determine the samples."""
    asked = json.dumps([[question.text, question.answer] for question in questions])
    values = config.critical
    found = {
        one.options[-1].removeprefix("--").replace("-", "_"): values[one.name]
        for one in settings_of(DataGenConfig)
        if one.name in values
    }
    # What --data was called when the first folders were written.
    found["dataset"] = found.pop("data")
    return found | {"dtype": dtype, "problems_sha256": hashlib.sha256(asked.encode()).hexdigest()}


class _ShardMaker:
    """Generates shards by number. A shard is a fixed range of problems."""

    def __init__(
        self, config: DataGenConfig, model: ThinkingModel, questions: list[Question], dtype: str
    ) -> None:
        self._config, self._model, self._questions, self._dtype = config, model, questions, dtype
        self._decoder = ThoughtDecoder(
            model, config.sampling, config.limits, config.batch_size, DTYPES[dtype]
        )

    @property
    def batch_size(self) -> int:
        """Problems per batch."""
        return self._decoder.batch_size

    def problems(self, number: int) -> range:
        """Indices of the problems of shard ``number``."""
        size = self._config.shard_size
        return range(number * size, min((number + 1) * size, len(self._questions)))

    def check(self, numbers: Sequence[int]) -> None:
        """Reject questions of these shards that cannot be encoded, before generating any shard.

        Raises:
            InputError: See :meth:`ThinkingModel.encode`.
        """
        for number in numbers:
            self._tokens(self.problems(number))

    def _tokens(self, indices: range) -> list[list[int]]:
        return self._model.encode([self._questions[index].text for index in indices])

    def make(self, number: int, report: Callable[[Outcome], None]) -> None:
        """Generate and write shard ``number``, calling ``report`` with each outcome."""
        indices = self.problems(number)
        tokens = self._tokens(indices)
        pairs: list[Pair] = []
        failures: dict[str, list[int]] = {}
        for index, outcome in self._decoder.run(dict(zip(indices, tokens, strict=True)), report).items():
            if isinstance(outcome, Thought):
                pairs.append(Pair(outcome.hidden_pre, outcome.hidden_post, self._record(index, outcome)))
            else:
                failures.setdefault(outcome, []).append(index)
        write_shard(self._config.output, number, pairs, failures, self._model.hidden_size, self._dtype)

    def _record(self, index: int, thought: Thought) -> dict[str, Any]:
        tokenizer, question = self._model.tokenizer, self._questions[index]
        response = str(tokenizer.decode(thought.response, skip_special_tokens=True)).strip()
        correct = None
        # A truncated response might still have reached the correct answer.
        if thought.complete and question.answer is not None:
            correct = is_correct(response, question.answer)
        return {
            "index": index,
            "problem": question.text,
            "answer": question.answer,
            "thinking": tokenizer.decode(thought.thinking),
            "context_length": len(thought.hidden_pre),
            "thinking_tokens": len(thought.thinking),
            "next_token": thought.next_token,
            "response": response,
            "correct": correct,
        }
