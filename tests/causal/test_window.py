"""Tests of the window: what a position sees when the decoder's context is exceeded."""

from __future__ import annotations

import pytest
import torch

from llm_trm.errors import InputError
from tests.causal.test_generation import generate
from tests.causal.tiny import REASONERS, THINK, padded, tiny_decoder, tiny_trm

EXACT = {"rtol": 1e-4, "atol": 1e-4}
#: 17, 15 and 9 positions with soft tokens, in a context of 12.
ROWS = [
    [5, 6, 7, 8, 9, THINK, 10, 11, THINK, 12, 13],
    [14, 15, 16, 17, 18, 19, 20, 21, 22, 23, THINK, 24],
    [25, 26, THINK, 27, 28, 29],
]


def with_another(ids: torch.Tensor, place: int) -> torch.Tensor:
    return ids.index_fill(1, torch.tensor([place]), 11)


@pytest.mark.parametrize("window", ["slide", "always"])
@pytest.mark.parametrize("reasoner", REASONERS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_slides_equally_with_and_without_cache(window: str, reasoner: str, side: str) -> None:
    rows = ROWS if window == "slide" else ROWS[:2]
    model = tiny_trm(decoder=tiny_decoder(max_position_embeddings=12), reasoner=reasoner, window=window)
    ids, mask = padded(rows, side)
    trained = model(input_ids=ids, attention_mask=mask).logits
    with torch.no_grad():
        cached = model(input_ids=ids, attention_mask=mask, use_cache=True).logits
    torch.testing.assert_close(cached, trained, **EXACT)
    for number, row in enumerate(rows):
        alone = model(input_ids=torch.tensor([row])).logits[0]
        torch.testing.assert_close(trained[number][mask[number] != 0], alone, **EXACT)


@pytest.mark.parametrize("window", ["slide", "always"])
def test_slides_token_by_token(window: str) -> None:
    # 12 columns in the last pass of generation, 25 in the comparison: the same tokens must be invisible.
    model = tiny_trm(decoder=tiny_decoder(max_position_embeddings=16), window=window)
    ids, mask = padded([[5, 6, 7, 8, THINK, 9], [10, 11, 12, 13, 14, 15]], "left")
    script = [[16, 17, 18, THINK, 19, 20, 21], [22, THINK, 23, 24, 25, 26, 27]]
    made = generate(model, ids, mask, script=script, max_new_tokens=8)
    trained = model(input_ids=made.sequences).logits
    torch.testing.assert_close(trained[:, 5:-1], torch.stack(made.logits, 1), **EXACT)


def test_positions_outside_the_window_are_not_seen() -> None:
    decoder = tiny_decoder(max_position_embeddings=8, num_hidden_layers=1)
    model = tiny_trm(decoder=decoder)
    # Ten positions with soft tokens: the last sees positions 2 to 9, the one before it sees 1 to 8.
    first = torch.tensor([[5, 6, 7, 8, THINK, 9, 10]])
    with torch.no_grad():
        model.model.reasoner.entry.projection.weight.zero_()
        found = [model(input_ids=with_another(first, place)).logits[0] for place in range(4)]
        base = model(input_ids=first).logits[0]
    seen = torch.stack([(logits - base).abs().amax(-1) > 1e-5 for logits in found])
    assert seen[:, -1].tolist() == [False, False, True, True]
    assert seen[:, -2].tolist() == [False, True, True, True]


def test_always_drops_as_many_as_it_appends() -> None:
    decoder = tiny_decoder(num_hidden_layers=1)
    model = tiny_trm(decoder=decoder, window="always")
    ids = torch.tensor([[5, 6, 7, 8, THINK, 9]])
    with torch.no_grad():
        model.model.reasoner.entry.projection.weight.zero_()
        base = model(input_ids=ids).logits[0]
        found = [model(input_ids=with_another(ids, place)).logits[0] for place in range(4)]
    assert [bool((logits - base)[-1].abs().max() > 1e-5) for logits in found] == [False] * 3 + [True]
    with pytest.raises(InputError, match="3 positions before <think> are too few to replace 3"):
        model(input_ids=ids[:, 1:])


def test_rejects_positions_that_cannot_slide() -> None:
    decoder = tiny_decoder(
        max_position_embeddings=12,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    )
    model = tiny_trm(decoder=decoder)
    assert model(input_ids=torch.tensor([ROWS[2]])).logits.isfinite().all()
    with pytest.raises(InputError, match="does not support a sliding window"):
        model(input_ids=torch.tensor([ROWS[0]]))


def test_layers_with_a_window_of_their_own() -> None:
    decoder = tiny_decoder("mistral", sliding_window=5)
    model = tiny_trm(decoder=decoder)
    ids = torch.tensor([ROWS[0]])
    with torch.no_grad():
        cached = model(input_ids=ids, use_cache=True).logits
    torch.testing.assert_close(cached, model(input_ids=ids).logits, **EXACT)
    batch, mask = padded(ROWS[:2])
    with pytest.raises(InputError, match="batches of one sample"):
        model(input_ids=batch, attention_mask=mask)
