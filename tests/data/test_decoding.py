"""Tests of the decode loop against plain forward passes over its output, and of its failures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_trm.data import decoding
from llm_trm.data.decoding import Outcome, Thought, ThoughtDecoder
from llm_trm.data.generation_config import Limits, Sampling
from llm_trm.errors import InputError
from llm_trm.models.loading import ThinkingModel
from llm_trm.upstream import cache_name

PROBLEMS = 24
LIMITS = Limits(prompt=100, thinking=30, answer=6)


def _prompts(model: ThinkingModel) -> dict[int, list[int]]:
    """Prompts of different lengths, with indices that do not start at 0."""
    return {
        100 + i: model.tokenizer(model.prompt(f"{'9+' * (i % 7)}{i}"), add_special_tokens=False)["input_ids"]
        for i in range(PROBLEMS)
    }


def _decode(model: ThinkingModel, batch_size: int, **changes: Any) -> dict[int, Outcome]:
    decoder = ThoughtDecoder(
        model,
        changes.get("sampling", Sampling(1.0)),
        changes.get("limits", LIMITS),
        batch_size,
        torch.float32,
    )
    return decoder.run(changes.get("prompts") or _prompts(model))


@pytest.fixture(scope="module")
def outcomes(model: ThinkingModel) -> dict[int, Outcome]:
    return _decode(model, 8)


def _thoughts(outcomes: Mapping[int, Outcome]) -> dict[int, Thought]:
    return {index: outcome for index, outcome in outcomes.items() if isinstance(outcome, Thought)}


def _tokens(outcome: Outcome) -> Any:
    if isinstance(outcome, str):
        return outcome
    return outcome.preamble, outcome.thinking, outcome.next_token, outcome.response, outcome.complete


def test_sample_covers_all_outcomes(outcomes: dict[int, Outcome]) -> None:
    thoughts = _thoughts(outcomes).values()
    assert len(thoughts) >= 5
    assert any(thought.preamble for thought in thoughts)
    assert any(not thought.preamble for thought in thoughts)
    assert any(len(thought.response) == LIMITS.answer for thought in thoughts)
    failures = Counter(outcome for outcome in outcomes.values() if isinstance(outcome, str))
    assert set(failures) == {decoding.NO_THINK, decoding.NO_END_THINK, decoding.STOPPED_THINKING}


def test_states_equal_a_plain_forward_pass(model: ThinkingModel, outcomes: dict[int, Outcome]) -> None:
    prompts = _prompts(model)
    for index, thought in _thoughts(outcomes).items():
        context = prompts[index] + thought.preamble
        text = [*context, model.think, *thought.thinking, model.end_think]
        with torch.no_grad():
            whole = model.model(torch.tensor([text + thought.response]), output_hidden_states=True)
        states = whole.hidden_states[-1][0]
        assert thought.hidden_pre.shape == (len(context), model.hidden_size)
        torch.testing.assert_close(thought.hidden_pre, states[: len(context)], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(thought.hidden_post, states[len(text) - 1], rtol=1e-4, atol=1e-4)
        likeliest = whole.logits[0, len(text) - 1 :].argmax(-1).tolist()
        assert likeliest[0] == thought.next_token
        assert likeliest[: len(thought.response)] == thought.response
        if thought.complete:
            assert likeliest[len(thought.response)] == model.tokenizer.eos_token_id


@pytest.mark.parametrize("batch_size", [1, 3, PROBLEMS])
def test_batch_size_does_not_change_samples(
    model: ThinkingModel, outcomes: dict[int, Outcome], batch_size: int
) -> None:
    others = _decode(model, batch_size)
    assert list(others) == list(outcomes) == list(_prompts(model))
    assert {i: _tokens(o) for i, o in others.items()} == {i: _tokens(o) for i, o in outcomes.items()}
    for index, thought in _thoughts(outcomes).items():
        other = _thoughts(others)[index]
        torch.testing.assert_close(other.hidden_pre, thought.hidden_pre, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(other.hidden_post, thought.hidden_post, rtol=1e-4, atol=1e-4)


def test_sample_does_not_depend_on_other_problems(model: ThinkingModel, outcomes: dict[int, Outcome]) -> None:
    index = next(iter(_thoughts(outcomes)))
    alone = _decode(model, 8, prompts={index: _prompts(model)[index]})
    assert _tokens(alone[index]) == _tokens(outcomes[index])
    other_seed = _decode(model, 8, sampling=Sampling(1.0, seed=1))
    assert {i: _tokens(o) for i, o in other_seed.items()} != {i: _tokens(o) for i, o in outcomes.items()}


def test_every_token_is_read_once_and_only_last_positions_reach_the_head(
    model: ThinkingModel, outcomes: dict[int, Outcome]
) -> None:
    thoughts = _thoughts(outcomes)
    prompts = {index: prompt for index, prompt in _prompts(model).items() if index in thoughts}
    read, headed = Counter[int](), set()

    def reads(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        assert not inputs.get("output_hidden_states")
        read[inputs["input_ids"].shape[1]] += 1

    hooks = (
        model.model.base_model.register_forward_pre_hook(reads, with_kwargs=True),
        model.model.get_output_embeddings().register_forward_pre_hook(lambda _, x: headed.add(x[0].shape)),
    )
    try:
        _decode(model, 1, prompts=prompts)
    finally:
        for hook in hooks:
            hook.remove()
    expected = Counter(len(prompt) for prompt in prompts.values())
    for thought in thoughts.values():
        # Includes both tags, but not the last token of the response, which is never read.
        expected[1] += len(thought.preamble) + len(thought.thinking) + 2
        expected[1] += len(thought.response) - (not thought.complete)
    assert read == expected
    assert headed == {(1, model.hidden_size)}


def test_rows_leave_and_enter_the_batch(model: ThinkingModel) -> None:
    shapes = []
    hook = model.model.base_model.register_forward_pre_hook(
        lambda _, __, inputs: shapes.append(
            (*inputs["input_ids"].shape, inputs[cache_name()].get_seq_length(), inputs["attention_mask"])
        ),
        with_kwargs=True,
    )
    try:
        _decode(model, 8)
    finally:
        hook.remove()
    steps = [(rows, past, mask) for rows, length, past, mask in shapes if length == 1]
    assert max(rows for rows, _, _ in steps) == 8
    assert min(rows for rows, _, _ in steps) < 8
    assert sum(length > 1 for _, length, _, _ in shapes) > PROBLEMS // 8
    for rows, past, mask in steps:
        assert mask.shape == (rows, past + 1)
        assert (mask.sum(1) == past + 1).any(), "a column is padding in every row"


def _scripted(model: ThinkingModel, *scripts: Sequence[int], **changes: Any) -> list[Outcome]:
    """Decode a given list of tokens for each problem instead of sampling."""

    def draw(_: Sampling, logits: Tensor, problem: Tensor, position: Tensor, greedy: Tensor) -> Tensor:
        likeliest = logits.argmax(-1).tolist()
        rows = zip(problem.tolist(), position.tolist(), greedy.tolist(), likeliest, strict=True)
        return torch.tensor([best if done else scripts[i][at] for i, at, done, best in rows])

    prompt = model.tokenizer(model.prompt("1+2"), add_special_tokens=False)["input_ids"]
    prompts = dict.fromkeys(range(len(scripts)), changes.pop("prompt", prompt))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "draw", draw)
        return list(_decode(model, 8, prompts=prompts, sampling=Sampling(), **changes).values())


def test_reasons(model: ThinkingModel) -> None:
    think, close, end, word = model.think, model.end_think, model.tokenizer.eos_token_id, 50
    outcomes = _scripted(
        model,
        [word, end],
        [close],
        [word] * 5,
        [think, word, end],
        [think, word, word, word, word],
        [word, think, word, think, close],
        limits=Limits(thinking=5, answer=0),
    )
    assert outcomes[:3] == [decoding.NO_THINK] * 3
    assert outcomes[3:5] == [decoding.STOPPED_THINKING, decoding.NO_END_THINK]
    last = outcomes[5]
    assert isinstance(last, Thought), "</think> is the last allowed token"
    assert (last.preamble, last.thinking, last.response) == ([word], [word, think], [])


def test_tags_of_the_prompt_do_not_count(model: ThinkingModel) -> None:
    prompt = [60, model.think, 61, model.end_think, 62]
    (outcome,) = _scripted(model, [model.think, 50, model.end_think], prompt=prompt)
    assert isinstance(outcome, Thought)
    assert (len(outcome.hidden_pre), outcome.thinking) == (5, [50])


def test_prompt_that_ends_in_an_open_tag(model: ThinkingModel) -> None:
    newline = model.tokenizer.encode("\n", add_special_tokens=False)
    prompt = [60, 61, 62, model.think, *newline]
    thought, stopped = _scripted(
        model, [50, 51, model.end_think], [model.tokenizer.eos_token_id], prompt=prompt
    )
    assert stopped == decoding.STOPPED_THINKING
    assert isinstance(thought, Thought)
    assert (thought.preamble, thought.thinking) == ([], [50, 51])
    states = model.model.base_model(torch.tensor([[*prompt, 50, 51, model.end_think]])).last_hidden_state[0]
    torch.testing.assert_close(thought.hidden_pre, states[:3], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(thought.hidden_post, states[-1], rtol=1e-4, atol=1e-4)


def test_nothing_before_the_tag(model: ThinkingModel) -> None:
    assert _scripted(model, [model.end_think], prompt=[model.think]) == [decoding.EMPTY_CONTEXT]


def test_long_prompts_fail_and_are_not_truncated(model: ThinkingModel) -> None:
    script = [model.think, model.end_think]
    for length, limit, fits in ((20, 20, True), (21, 20, False), (510, 999, True), (512, 999, False)):
        (outcome,) = _scripted(model, script, prompt=[60] * length, limits=Limits(prompt=limit))
        assert isinstance(outcome, Thought) == fits, length
        assert fits or outcome == decoding.PROMPT_TOO_LONG


def test_generation_stops_where_the_context_of_the_model_ends(model: ThinkingModel) -> None:
    # The prompt takes 506 of 512 positions. Six more tokens can be read, and the last may be </think>.
    words = [50] * 600
    outcomes = _scripted(
        model,
        [model.think, *words],
        [model.think, 50, 50, 50, 50, model.end_think],
        [model.think, 50, model.end_think],
        prompt=[60] * 506,
        limits=Limits(prompt=999, thinking=999, answer=100),
    )
    assert outcomes[0] == decoding.NO_END_THINK
    at_the_end, with_room = outcomes[1:]
    assert isinstance(at_the_end, Thought)
    assert len(at_the_end.response) == 1
    assert isinstance(with_room, Thought)
    assert len(with_room.response) <= 3


def test_non_finite_states_are_a_failure(model: ThinkingModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.model.base_model.norm, "forward", lambda states: states * torch.nan)
    assert set(_decode(model, 8).values()) == {decoding.NOT_FINITE}


class _SmallMemory:
    """A backbone that runs out of memory above a number of rows."""

    def __init__(self, backbone: Any, rows: int) -> None:
        self.backbone, self.rows, self.calls = backbone, rows, 0

    def __call__(self, **inputs: Any) -> Any:
        output = self.backbone(**inputs)
        # Raise after the call, when the cache has grown, and only in some calls, so that some rows advance.
        self.calls += 1
        if inputs["input_ids"].shape[0] > self.rows and self.calls % 4 == 0:
            raise torch.OutOfMemoryError("fake")
        return output


def test_out_of_memory_halves_the_batch_and_changes_no_sample(
    model: ThinkingModel, outcomes: dict[int, Outcome]
) -> None:
    decoder = ThoughtDecoder(model, Sampling(1.0), LIMITS, 8, torch.float32)
    decoder._backbone = _SmallMemory(model.model.base_model, 2)
    reported: list[Outcome] = []
    found = decoder.run(_prompts(model), reported.append)
    assert decoder.batch_size == 2
    assert {i: _tokens(o) for i, o in found.items()} == {i: _tokens(o) for i, o in outcomes.items()}
    assert len(reported) == PROBLEMS, "each once"


def test_out_of_memory_with_one_problem_is_an_error(model: ThinkingModel) -> None:
    decoder = ThoughtDecoder(model, Sampling(1.0), LIMITS, 8, torch.float32)
    decoder._backbone = _SmallMemory(model.model.base_model, 0)
    with pytest.raises(InputError, match="out of memory with one problem"):
        decoder.run(_prompts(model))


def test_end_tokens_of_the_generation_config_count(
    model: ThinkingModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.model.generation_config, "eos_token_id", [70, 71])
    assert _scripted(model, [model.think, 71]) == [decoding.STOPPED_THINKING]
    assert _scripted(model, [model.think, model.tokenizer.eos_token_id]) == [decoding.STOPPED_THINKING]


def test_states_are_kept_in_the_type_asked_for(model: ThinkingModel) -> None:
    decoder = ThoughtDecoder(model, Sampling(1.0), replace(LIMITS, answer=0), 8, torch.bfloat16)
    thought = next(iter(_thoughts(decoder.run(_prompts(model))).values()))
    assert thought.hidden_pre.dtype == thought.hidden_post.dtype == torch.bfloat16
    assert thought.response == []
