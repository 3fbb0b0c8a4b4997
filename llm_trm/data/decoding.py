"""Batched generation that records the states for training a recursion, in one pass over every token."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llm_trm.data.batch import Batch, Row
from llm_trm.data.generation_config import Limits, Sampling
from llm_trm.data.sampling import draw
from llm_trm.errors import InputError
from llm_trm.upstream import cache_name

if TYPE_CHECKING:
    from transformers import DynamicCache

    from llm_trm.models.loading import ThinkingModel

EMPTY_CONTEXT = "empty_context"
NO_END_THINK = "no_end_think"
NO_THINK = "no_think"
NOT_FINITE = "not_finite"
PROMPT_TOO_LONG = "prompt_too_long"
STOPPED_THINKING = "stopped_thinking"

#: Reasons why a problem yields no sample.
REASONS = {
    EMPTY_CONTEXT: "nothing before <think>",
    NO_END_THINK: "no </think> within --max-new-tokens or the model's context",
    NO_THINK: "no <think>",
    NOT_FINITE: "states with NaN or infinity",
    PROMPT_TOO_LONG: "prompt longer than --max-prompt-tokens or the model's context",
    STOPPED_THINKING: "the model ended its turn before </think>",
}


@dataclass(frozen=True)
class Thought:
    """The result of thinking about a problem.

    Attributes:
        hidden_pre: ``[L, D]``, on the CPU, final-norm states of every position before ``<think>``.
        hidden_post: ``[D]``, final-norm state at ``</think>``.
        preamble: Tokens generated before ``<think>``. ``hidden_pre`` covers the prompt and these.
        thinking: Tokens between the tags.
        next_token: The most likely token after ``</think>``.
        response: Greedily decoded tokens after ``</think>``, without the end token.
        complete: Whether the response ended with an end token.
    """

    hidden_pre: Tensor
    hidden_post: Tensor
    preamble: list[int]
    thinking: list[int]
    next_token: int
    response: list[int]
    complete: bool


#: A thought, or a key of :data:`REASONS`.
Outcome = Thought | str


class ThoughtDecoder:
    """Lets a model think about a batch of problems at a time.

    Rows leave the batch when they finish, and new ones enter when it is half empty. The cache is padded on
    the left, and every row has its own position ids. The output head only reads the last position.

    Sampling uses the logits of the output head. For a model that scales or caps its logits afterwards, the
    effective temperature therefore differs from the requested one.

    Args:
        model: A decoder with a key-value cache whose ``last_hidden_state`` comes after its final norm.
        sampling: Sampling up to ``</think>``; the answer is decoded greedily.
        limits: Maximum lengths.
        batch_size: Maximum number of rows. Halved permanently when the device runs out of memory.
        dtype: Dtype of the stored states.
    """

    def __init__(
        self, model: ThinkingModel, sampling: Sampling, limits: Limits, batch_size: int, dtype: torch.dtype
    ) -> None:
        self.batch_size = batch_size
        self._model, self._sampling, self._limits, self._dtype = model, sampling, limits, dtype
        self._backbone = model.model.base_model
        self._head = model.model.get_output_embeddings()
        self._positions = int(model.model.config.get_text_config().max_position_embeddings)
        self._ends = _end_tokens(model)

    def run(
        self, prompts: Mapping[int, Sequence[int]], report: Callable[[Outcome], None] = lambda _: None
    ) -> dict[int, Outcome]:
        """Think about every prompt.

        Args:
            prompts: Token ids by problem index. The sampling noise depends on the index.
            report: Called with each outcome once it is available.

        Returns:
            Outcomes in the order of ``prompts``.

        Raises:
            InputError: A single problem does not fit into the device's memory.
        """
        outcomes: dict[int, Outcome] = {}

        def settle(index: int, outcome: Outcome) -> None:
            outcomes[index] = outcome
            report(outcome)

        for index, prompt in prompts.items():
            if (reason := self._unsuitable(prompt)) is not None:
                settle(index, reason)
        batch: Batch | None = None
        waiting = self._queue(prompts, outcomes)
        while batch is not None or waiting:
            out_of_memory = False
            try:
                batch, done = self._advance(batch, waiting)
            except torch.OutOfMemoryError:
                out_of_memory = True
            # Not in the except block, where the exception still references the failed call's tensors.
            if out_of_memory:
                self._halve(len(prompts) - len(outcomes))
                # Restart the rows in progress. Their noise, and so their tokens, stay the same.
                batch, done, waiting = None, [], self._queue(prompts, outcomes)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            for row, outcome in done:
                settle(row.index, outcome)
        return {index: outcomes[index] for index in prompts}

    def _unsuitable(self, prompt: Sequence[int]) -> str | None:
        if len(prompt) > self._limits.prompt or len(prompt) >= self._positions:
            return PROMPT_TOO_LONG
        return None if self._context_length(prompt) else EMPTY_CONTEXT

    def _context_length(self, prompt: Sequence[int]) -> int:
        """Number of tokens before ``<think>`` if the prompt ends in an open one, otherwise of all tokens."""
        think = self._model.think
        if think in prompt:
            last = len(prompt) - 1 - list(reversed(prompt)).index(think)
            if not str(self._model.tokenizer.decode(list(prompt[last + 1 :]))).strip():
                return last
        return len(prompt)

    def _queue(self, prompts: Mapping[int, Sequence[int]], outcomes: Mapping[int, Outcome]) -> deque[Row]:
        # Sorting by length minimises padding. With the longest first, memory runs out early if at all.
        order = sorted(prompts.keys() - outcomes.keys(), key=lambda index: (-len(prompts[index]), index))
        return deque(Row(index, prompts[index], self._context_length(prompts[index])) for index in order)

    def _halve(self, unsettled: int) -> None:
        rows = min(self.batch_size, unsettled)
        if rows == 1:
            raise InputError(
                "the device is out of memory with one problem at a time: lower --max-new-tokens or "
                "--max-prompt-tokens, or use a smaller --model"
            )
        self.batch_size = rows // 2

    @torch.no_grad()
    def _advance(
        self, batch: Batch | None, waiting: deque[Row]
    ) -> tuple[Batch | None, list[tuple[Row, Outcome]]]:
        """One forward pass: over new prompts if the batch has room, else over the next token of every row."""
        rows = 0 if batch is None else len(batch.rows)
        if batch is not None and (not waiting or 2 * rows > self.batch_size):
            states = self._forward(batch.cache, batch.tokens[:, None], batch.mask, batch.lengths[:, None] - 1)
            return self._extend(batch, states[:, -1])
        entering = [waiting.popleft() for _ in range(min(self.batch_size - rows, len(waiting)))]
        fresh, done = self._extend(*self._read_prompts(entering))
        if batch is None or fresh is None:
            return batch or fresh, done
        batch.join(fresh)
        return batch, done

    def _read_prompts(self, rows: list[Row]) -> tuple[Batch, Tensor]:
        from transformers import DynamicCache

        device = self._head.weight.device
        longest = max(len(row.prompt) for row in rows)
        pad = int(self._model.tokenizer.pad_token_id)
        tokens = torch.tensor([[pad] * (longest - len(row.prompt)) + list(row.prompt) for row in rows])
        lengths = torch.tensor([len(row.prompt) for row in rows], device=device)
        mask = (torch.arange(longest, device=device) >= longest - lengths[:, None]).long()
        tokens, cache = tokens.to(device), DynamicCache()
        states = self._forward(cache, tokens, mask, (mask.cumsum(-1) - 1).clamp(min=0))
        for row, of_row in zip(rows, states, strict=True):
            first = longest - len(row.prompt)
            row.context = [self._kept(of_row[first : first + row.context_length])]
        return Batch(rows, cache, mask, lengths, tokens[:, -1]), states[:, -1]

    def _forward(self, cache: DynamicCache, tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Final-norm states ``[B, K, D]`` of ``tokens`` ``[B, K]``, which are added to ``cache``."""
        output = self._backbone(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            **{cache_name(): cache},
        )
        states: Tensor = output.last_hidden_state
        return states

    def _extend(self, batch: Batch, states: Tensor) -> tuple[Batch | None, list[tuple[Row, Outcome]]]:
        """Sample the token after ``states`` ``[B, D]`` in every row, and remove finished rows."""
        device = states.device
        index, written, greedy = torch.tensor(
            [[row.index, len(row.written), row.thought] for row in batch.rows], device=device
        ).unbind(-1)
        tokens = draw(self._sampling, self._head(states), index, written, greedy.bool())
        done, staying = [], []
        for number, (row, token) in enumerate(zip(batch.rows, tokens.tolist(), strict=True)):
            outcome = self._write(row, token, states[number])
            if outcome is None:
                staying.append(number)
            else:
                done.append((row, outcome if row.is_finite() else NOT_FINITE))
        if not staying:
            return None, done
        batch.feed(tokens)
        if done:
            batch.keep(staying)
        return batch, done

    def _write(self, row: Row, token: int, state: Tensor) -> Outcome | None:
        """Append ``token``, sampled at the position with ``state``. Returns the outcome if the row ends."""
        if row.thought:
            return self._answer(row, token, state)
        if row.written and row.thinking_from is None:
            row.context.append(self._kept(state[None]))
        row.written.append(token)
        if token == self._model.end_think:
            row.thought = row.thinking_from is not None
            return None if row.thought else NO_THINK
        if token in self._ends:
            return NO_THINK if row.thinking_from is None else STOPPED_THINKING
        if token == self._model.think and row.thinking_from is None:
            row.thinking_from = len(row.written)
        # The next position to feed is len(prompt) + len(written) - 1.
        if len(row.written) >= min(self._limits.thinking, self._positions - len(row.prompt)):
            return NO_THINK if row.thinking_from is None else NO_END_THINK
        return None

    def _answer(self, row: Row, token: int, state: Tensor) -> Outcome | None:
        if row.post is None:
            row.post, row.next_token = self._kept(state), token
        complete = token in self._ends
        if not complete and self._limits.answer:
            row.response.append(token)
            room = self._positions - len(row.prompt) - len(row.written)
            if len(row.response) < min(self._limits.answer, room):
                return None
        assert row.thinking_from is not None
        preamble, thinking = row.written[: max(row.thinking_from - 1, 0)], row.written[row.thinking_from : -1]
        pre = torch.cat(row.context)
        return Thought(pre, row.post, preamble, thinking, row.next_token, row.response, complete)

    def _kept(self, states: Tensor) -> Tensor:
        # Copy even on the CPU, where a view would keep the states of the whole batch alive.
        return states.to("cpu", self._dtype, copy=True)


def _end_tokens(model: ThinkingModel) -> set[int]:
    configured = model.model.generation_config.eos_token_id
    ends = configured if isinstance(configured, list) else [configured]
    return {end for end in (*ends, model.tokenizer.eos_token_id) if end is not None}
