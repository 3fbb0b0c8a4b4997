"""Tests of generation with transformers' generate: soft tokens in the cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from llm_trm.errors import InputError
from llm_trm.models.causal import TRMCache, TRMForCausalLM
from llm_trm.upstream import cache_of
from tests.causal.tiny import KINDS, REASONERS, ROWS, THINK, padded, tiny_decoder, tiny_trm

EXACT = {"rtol": 1e-4, "atol": 1e-4}


class Script(LogitsProcessor):
    """Makes samples write ``tokens`` [B, n], then any tokens except the end token."""

    def __init__(self, prompt: int, tokens: list[list[int]]) -> None:
        self.prompt, self.tokens = prompt, torch.tensor(tokens)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.prompt
        scores = scores.index_fill(1, torch.tensor([2]), -torch.inf)
        if step >= self.tokens.shape[1]:
            return scores
        wanted = self.tokens[:, step : step + 1]
        return torch.full_like(scores, -torch.inf).scatter(1, wanted, 0.0)


def generate(model: TRMForCausalLM, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Any:
    script = options.pop("script", [[]] * len(ids))
    return model.generate(
        input_ids=ids,
        attention_mask=mask,
        logits_processor=LogitsProcessorList([Script(ids.shape[1], script)]),
        return_dict_in_generate=True,
        output_logits=True,
        **{"max_new_tokens": 6, "do_sample": False, **options},
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reasoner", REASONERS)
def test_logits_are_those_of_the_training_forward(kind: str, reasoner: str) -> None:
    model = tiny_trm(kind, reasoner)
    ids, mask = padded(ROWS, "left")
    # Some samples write one <think>, some two and the last none, at different positions.
    script = [[9, THINK, 7], [THINK, 8, THINK], [3, 4, 5], [THINK, THINK, 6], [9, 9, 9]]
    made = generate(model, ids, mask, script=script)
    mask = torch.cat((mask, torch.ones(len(ids), 6, dtype=torch.long)), 1)
    trained = model(input_ids=made.sequences, attention_mask=mask)
    written = torch.stack(made.logits, 1)
    torch.testing.assert_close(trained.logits[:, ids.shape[1] - 1 : -1], written, **EXACT)
    steps = cache_of(made).steps
    # The last token is not read. Unscripted tokens may be <think> as well.
    assert torch.equal((steps > 0).sum(1), (made.sequences[:, :-1] == THINK).sum(1))


def test_batched_generation_equals_single_generation() -> None:
    model = tiny_trm()
    ids, mask = padded(ROWS, "left")
    together = generate(model, ids, mask).sequences[:, ids.shape[1] :]
    for row, wrote in zip(ROWS, together, strict=True):
        alone = generate(model, torch.tensor([row])).sequences[0, len(row) :]
        assert torch.equal(alone, wrote)


def test_writing_depends_on_the_recursion() -> None:
    ids = torch.tensor([[5, 6, 7]])
    script = [[8, THINK]]
    written = []
    for _ in range(2):
        model = tiny_trm()
        if written:
            torch.nn.init.normal_(model.model.reasoner.trm.net.layers[0].mlp[0].weight)
        written.append(torch.stack(generate(model, ids, script=script).logits, 1)[0])
    assert torch.equal(written[0][:2], written[1][:2])
    assert (written[0][2:] - written[1][2:]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_recursion_it_writes_as_the_plain_model(kind: str) -> None:
    decoder = tiny_decoder(kind)
    ids, mask = padded(ROWS, "left")
    plain = generate(decoder, ids, mask, script=[[THINK]] * 5)
    found = generate(tiny_trm(decoder=decoder), ids, mask, script=[[THINK]] * 5, use_trm=False)
    assert torch.equal(found.sequences, plain.sequences)
    assert torch.equal(torch.stack(found.logits), torch.stack(plain.logits))
    assert type(cache_of(found)) is DynamicCache


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"prefill_chunk_size": 3},
        {"num_beams": 3},
        {"num_beams": 3, "use_cache": False},
        {"cache_implementation": "dynamic"},
    ],
    ids=str,
)
def test_ways_of_generating_agree(options: dict[str, Any]) -> None:
    model = tiny_trm()
    ids, mask = padded(ROWS, "left")
    beams = {"num_beams": 3} if "num_beams" in options else {}
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, **beams)
    if beams:
        # Beams think at different tokens, because <think> is likely everywhere.
        with torch.no_grad():
            model.lm_head.weight[THINK] = model.lm_head.weight[expected[:, -1]].mean(0) * 1.5
        expected = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, **beams)
        assert (expected[:, ids.shape[1] :] == THINK).any()
    found = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, **options)
    assert torch.equal(found, expected)


def test_several_answers_to_one_prompt() -> None:
    model = tiny_trm()
    torch.manual_seed(0)
    made = model.generate(
        torch.tensor([ROWS[0]]), do_sample=True, num_return_sequences=4, max_new_tokens=4, min_new_tokens=4
    )
    assert made.shape == (4, len(ROWS[0]) + 4)


def test_conversation_continues_with_its_cache() -> None:
    model = tiny_trm()
    first = generate(model, torch.tensor([ROWS[0]]), max_new_tokens=3)
    longer = torch.cat((first.sequences, torch.tensor([[9, THINK, 4]])), 1)
    expected = generate(model, longer)
    found = generate(model, longer, past_key_values=cache_of(first))
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), **EXACT)
    assert isinstance(cache_of(found), TRMCache)
    assert cache_of(found).get_seq_length() == longer.shape[1] + 5


def test_cache_follows_its_samples() -> None:
    model = tiny_trm()
    ids, mask = padded(ROWS, "left")
    order = torch.tensor([3, 0, 1])
    with torch.no_grad():
        cache = model(input_ids=ids, attention_mask=mask, use_cache=True).past_key_values
        cache.batch_select_indices(order)
        cache.batch_repeat_interleave(2)
        order = order.repeat_interleave(2)
        step = torch.tensor([[THINK]] * 6)
        longer = torch.cat((mask[order], torch.ones_like(step)), 1)
        found = model(input_ids=step, attention_mask=longer, past_key_values=cache).logits
        whole = model(input_ids=torch.cat((ids[order], step), 1), attention_mask=longer).logits
    torch.testing.assert_close(found[:, 0], whole[:, -1], **EXACT)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.steps is None


def test_training_mode_generates_the_same() -> None:
    model = tiny_trm()
    ids, mask = padded(ROWS, "left")
    expected = generate(model, ids, mask)
    assert torch.equal(generate(model.train(), ids, mask).sequences, expected.sequences)
    model.gradient_checkpointing_enable()
    with pytest.raises(InputError, match="gradient checkpointing drops the cache"):
        generate(model, ids, mask)
    assert torch.equal(generate(model, ids, mask, use_cache=False).sequences, expected.sequences)
    assert torch.equal(generate(model.eval(), ids, mask).sequences, expected.sequences)


def test_refusals() -> None:
    model = tiny_trm()
    ids = torch.tensor([[5, THINK, 6]])
    with torch.no_grad():
        plain = model(input_ids=ids, use_trm=False, use_cache=True).past_key_values
        thought = model(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(InputError, match="filled without the recursion"):
        model(input_ids=ids, past_key_values=plain)
    with pytest.raises(InputError, match="use_trm=True"):
        model(input_ids=ids, past_key_values=thought, use_trm=False)
    with pytest.raises(InputError, match="cannot be cropped"):
        thought.crop(-1)
    with pytest.raises(InputError, match="paged cache"):
        model.generate_batch(ids.tolist(), max_new_tokens=2)
    with pytest.raises(InputError, match="paged cache"):
        model.generate(ids, cache_implementation="paged", max_new_tokens=2)
    with pytest.raises(InputError, match="StaticCache"):
        model.generate(ids, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        model.generate(ids, assistant_model=tiny_decoder(), max_new_tokens=2)
