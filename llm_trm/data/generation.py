"""Runs a language model in thinking mode on problems, and keeps its states before and after it thought."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch

from llm_trm.data.arithmetic import Split, World
from llm_trm.data.decoding import Limits, Outcome, Thought, ThoughtDecoder
from llm_trm.data.grading import is_correct
from llm_trm.data.pairs import DTYPES, Pair, PairFiles, open_pairs, summarize_shard, write_index, write_shard
from llm_trm.data.problems import Question, load_questions
from llm_trm.data.processes import launched_processes
from llm_trm.data.resume import begin, check_settings
from llm_trm.data.sampling import Sampling
from llm_trm.errors import InputError
from llm_trm.files import writable_folder
from llm_trm.models.loading import ThinkingModel, load_thinking_model
from llm_trm.ranges import BATCH, COUNT, require_ranges


@dataclass(frozen=True)
class DataGenConfig:
    """Settings of :class:`ThinkingDataGenerator`.

    Attributes:
        output: Folder of the pairs.
        model: As :func:`llm_trm.models.loading.load_thinking_model` takes it.
        dataset, split, world: As :func:`llm_trm.data.problems.load_questions` takes them.
        num_samples: Problems; those that fail give no pair.
        sampling: Temperature, top-p and seed. The seed is the arithmetic world's, too.
        limits: Of prompt, thinking and answer.
        batch_size: Problems at a time on one device. No setting of the samples: it may change on resuming.
        shard_size: Problems a shard, the unit of resuming and of the division among processes.
        dtype: Of the stored states, a key of :data:`llm_trm.data.pairs.DTYPES`; None for the model's own.
        device: Where the model runs.
        fresh: Start over in a folder that holds another run's pairs.
        trust_remote_code: Run the Python files that the language model brings, if it needs them.

    Raises:
        InputError: A value out of range.
    """

    output: Path
    model: str = "arithmetic"
    dataset: str = "arithmetic"
    split: Split = "train"
    world: World = field(default_factory=World)
    num_samples: Annotated[int, COUNT] = 1000
    sampling: Sampling = field(default_factory=Sampling)
    limits: Limits = field(default_factory=Limits)
    batch_size: Annotated[int, BATCH] = 32
    shard_size: Annotated[int, COUNT] = 512
    dtype: str | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    fresh: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        require_ranges(self, InputError)


@dataclass
class GenerationProgress:
    """How far one process has come.

    Attributes:
        total: Problems of the shards that fall to this process.
        resumed: Those in shards that were there before.
        pairs: Problems that gave a pair.
        failures: Problems that gave none, by reason.
        batch_size: Problems at a time; less than asked for where memory ran out.
    """

    total: int = 0
    resumed: int = 0
    pairs: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    batch_size: int = 0

    @property
    def done(self) -> int:
        """Problems that are settled."""
        return self.resumed + self.pairs + self.failures.total()


class ThinkingDataGenerator:
    """Generates pairs of hidden states for phase 2, and resumes where it was interrupted.

    Under ``accelerate launch`` on P processes, process r makes the shards r, r + P, r + 2 P and so on. A
    shard depends on the settings alone, not on who makes it or when; batch size and device change its states
    by rounding.

    Args:
        config: Settings.
        model: Instead of loading ``config.model``; on the device that it is to run on.
        on_progress: Called with the state of this process after every problem.
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

    def run(self) -> PairFiles:
        """Generate what is missing, and index it.

        Raises:
            InputError: A folder that cannot be written or holds pairs of other settings, a model or a data
                set that cannot be loaded.
        """
        config, processes = self.config, launched_processes()
        questions = load_questions(
            config.dataset,
            config.num_samples,
            split=config.split,
            seed=config.sampling.seed,
            world=config.world,
        )
        if not questions:
            raise InputError(f"--dataset {config.dataset} holds no problem: name another")
        dtype = self._dtype()
        settings = _settings(config, questions, dtype)
        folder = writable_folder(config.output)
        if processes.is_main:
            check_settings(folder, settings, fresh=config.fresh)
        shards = range(-(-len(questions) // config.shard_size))
        mine = shards[processes.index :: processes.count]
        missing = [number for number in mine if config.fresh or summarize_shard(folder, number) is None]
        maker = None
        if missing:
            # Before anything is removed: a model that cannot be loaded costs nobody their pairs.
            model = self._model or load_thinking_model(
                config.model,
                processes.place(config.device),
                trust_remote_code=config.trust_remote_code,
            )
            maker = _ShardMaker(config, model, questions, dtype)
            maker.check(missing)
        if processes.is_main:
            begin(folder, settings, fresh=config.fresh)
        processes.wait()
        if maker is not None:
            self._generate(maker, mine, missing)
        processes.wait()
        if processes.is_main:
            write_index(folder, len(shards), model=config.model, seed=config.sampling.seed, settings=settings)
        processes.wait()
        return open_pairs(folder)

    def _dtype(self) -> str:
        if self.config.dtype is not None:
            name = self.config.dtype
        elif self._model is not None:
            name = str(self._model.model.dtype).removeprefix("torch.")
        else:  # what load_thinking_model takes
            name = "bfloat16" if self.config.device.type == "cuda" else "float32"
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
    """Everything that the samples depend on."""
    asked = json.dumps([[question.text, question.answer] for question in questions])
    return {
        "model": config.model,
        "dataset": config.dataset,
        "split": config.split,
        "min_operations": config.world.min_operations,
        "operations": config.world.max_operations,
        "modulus": config.world.modulus,
        "max_operand": config.world.max_operand,
        "num_samples": config.num_samples,
        "seed": config.sampling.seed,
        "temperature": config.sampling.temperature,
        "top_p": config.sampling.top_p,
        "max_prompt_tokens": config.limits.prompt,
        "max_new_tokens": config.limits.thinking,
        "answer_tokens": config.limits.answer,
        "shard_size": config.shard_size,
        "dtype": dtype,
        "problems_sha256": hashlib.sha256(asked.encode()).hexdigest(),
    }


class _ShardMaker:
    """Makes the shard of a number: a fixed range of problems."""

    def __init__(
        self, config: DataGenConfig, model: ThinkingModel, questions: list[Question], dtype: str
    ) -> None:
        self._config, self._model, self._questions, self._dtype = config, model, questions, dtype
        self._decoder = ThoughtDecoder(
            model, config.sampling, config.limits, config.batch_size, DTYPES[dtype]
        )

    @property
    def batch_size(self) -> int:
        """Problems at a time."""
        return self._decoder.batch_size

    def problems(self, number: int) -> range:
        """Indices of the problems of shard ``number``."""
        size = self._config.shard_size
        return range(number * size, min((number + 1) * size, len(self._questions)))

    def check(self, numbers: Sequence[int]) -> None:
        """Refuse questions of these shards that cannot be asked, before any is.

        Raises:
            InputError: See :meth:`ThinkingModel.encode`.
        """
        for number in numbers:
            self._tokens(self.problems(number))

    def _tokens(self, indices: range) -> list[list[int]]:
        return self._model.encode([self._questions[index].text for index in indices])

    def make(self, number: int, report: Callable[[Outcome], None]) -> None:
        """Generate shard ``number`` and write it; ``report`` gets each outcome when it is there."""
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
        # A response that was cut may have been on its way to the right answer.
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
