"""Tests of long contexts: prefixes read in portions, and their memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_trm.models.causal import TRMForCausalLM
from tests.causal.test_generation import generate
from tests.causal.tiny import KINDS, REASONERS, ROWS, THINK, padded, tiny_decoder, tiny_trm

EXACT = {"rtol": 1e-4, "atol": 1e-4}
#: Several thoughts, so that the window of the next excludes what the last one read.
SEVERAL = [
    [5, 6, 7, 8, THINK, 9, 10, 11, THINK, 12, 13, THINK, 14],
    [16, 17, 18, 19, THINK, 20, 21, 22, THINK, 23],
]

_MEASURED = """
import json, resource, sys, torch
from llm_trm.upstream import cache_of
from tests.causal.tiny import THINK, tiny_decoder, tiny_trm

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)

one = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
decoder = tiny_decoder(
    hidden_size=16, intermediate_size=2048, vocab_size=2048, max_position_embeddings=65536, **one
)
once = {"n_heads": 1, "compression_heads": 1, "supervision_steps": 1, "n_deep_recursions": 1}
model = tiny_trm(decoder=decoder, **once)
ids = torch.randint(32, 2048, (1, 65536))
ids[0, -1] = THINK
options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
model.generate(input_ids=ids[:, -2000:], **options)
before = peak()
made = model.generate(input_ids=ids, **options)
thoughts = int((cache_of(made).steps > 0).sum())
print(json.dumps({"megabytes": peak() - before, "thoughts": thoughts}))
"""


def test_memory_of_64k_tokens() -> None:
    # Above the memory of a prompt of 2,000 tokens. Measured: 282 MB, of which 268 are the mask of a portion,
    # 1,024 x 65,536 values. In one pass it is 1,557 MB, and the logits of the whole prompt would be 537.
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["thoughts"] >= 1
    assert found["megabytes"] < 400


def both_ways(model: TRMForCausalLM, chunk: int, **inputs: Any) -> tuple[Any, Any]:
    found = []
    for size in (None, chunk):
        model.model.prefill_chunk = size
        with torch.no_grad():
            found.append(model(**inputs))
    return found[0], found[1]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("reasoner", REASONERS)
@pytest.mark.parametrize("kind", KINDS)
def test_portions_equal_one_pass(kind: str, reasoner: str, side: str) -> None:
    ids, mask = padded(ROWS, side)
    whole, portions = both_ways(tiny_trm(kind, reasoner), 3, input_ids=ids, attention_mask=mask)
    real = mask != 0
    torch.testing.assert_close(portions.logits[real], whole.logits[real], **EXACT)
    torch.testing.assert_close(portions.halt_logits, whole.halt_logits, **EXACT)
    assert torch.equal(portions.trm_steps, whole.trm_steps)


@pytest.mark.parametrize("rows", [[ROWS[0]], [ROWS[4]], [ROWS[4][:8]], [ROWS[1], ROWS[1]]])
def test_without_gaps(rows: list[list[int]]) -> None:
    model = tiny_trm()
    whole, portions = both_ways(model, 3, input_ids=torch.tensor(rows))
    torch.testing.assert_close(portions.logits, whole.logits, **EXACT)
    model.set_attn_implementation("eager")
    _, eager = both_ways(model, 3, input_ids=torch.tensor(rows))
    torch.testing.assert_close(eager.logits, whole.logits, **EXACT)


@pytest.mark.parametrize("window", ["slide", "always"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_windows(window: str, side: str) -> None:
    model = tiny_trm(decoder=tiny_decoder(max_position_embeddings=13), window=window)
    ids, mask = padded(SEVERAL, side)
    whole, portions = both_ways(model, 2, input_ids=ids, attention_mask=mask)
    real = mask != 0
    torch.testing.assert_close(portions.logits[real], whole.logits[real], **EXACT)
    # With gradients there is no cache, and no state is discarded.
    trained = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(portions.logits[real], trained[real], **EXACT)


def test_layers_with_a_window_of_their_own() -> None:
    model = tiny_trm(decoder=tiny_decoder("mistral", sliding_window=5))
    whole, portions = both_ways(model, 3, input_ids=torch.tensor([ROWS[0]]))
    torch.testing.assert_close(portions.logits, whole.logits, **EXACT)


@pytest.mark.parametrize("use_cache", [None, False])
def test_states_of_layers_and_no_cache(use_cache: bool | None) -> None:
    ids = torch.tensor([ROWS[4], ROWS[1] + [3]])
    inputs = {"input_ids": ids, "use_cache": use_cache, "output_hidden_states": True}
    whole, portions = both_ways(tiny_trm(), 4, **inputs)
    assert (portions.past_key_values is None) == (use_cache is False)
    assert len(portions.hidden_states) == len(whole.hidden_states) == 3
    for one, other in zip(portions.hidden_states, whole.hidden_states, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_generation_and_its_last_logits() -> None:
    model = tiny_trm()
    ids, mask = padded(ROWS, "left")
    script = [[9, THINK, 7], [THINK, 8, THINK], [3, 4, 5], [THINK, THINK, 6], [9, 9, 9]]
    model.model.prefill_chunk = None
    whole = generate(model, ids, mask, script=script)
    model.model.prefill_chunk = 4
    portions = generate(model, ids, mask, script=script)
    assert torch.equal(portions.sequences, whole.sequences)
    torch.testing.assert_close(torch.stack(portions.logits), torch.stack(whole.logits), **EXACT)


@pytest.mark.parametrize("use_trm", [True, False])
@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 4, 7])])
def test_logits_to_keep(use_trm: bool, keep: int | Tensor) -> None:
    model = tiny_trm()
    ids, mask = padded(ROWS, "left")
    inputs = {"input_ids": ids, "attention_mask": mask, "use_trm": use_trm}
    every = model(**inputs).logits
    kept = model(**inputs, logits_to_keep=keep).logits
    wanted = every[:, -keep:] if isinstance(keep, int) else every[:, keep]
    torch.testing.assert_close(kept, wanted, rtol=1e-5, atol=1e-5)


def widths(model: TRMForCausalLM) -> list[int]:
    """Record the number of columns of each later pass of the decoder."""
    found: list[int] = []

    def note(_: Any, args: Any, options: dict[str, Any]) -> None:
        found.append(options["inputs_embeds"].shape[1])

    model.model.decoder.register_forward_pre_hook(note, with_kwargs=True)
    return found


def test_no_pass_reads_more_than_a_portion() -> None:
    model = tiny_trm()
    model.model.prefill_chunk = 4
    found = widths(model)
    ids = torch.tensor([[*range(3, 12), THINK, *range(12, 20)]])
    with torch.no_grad():
        cache = model(input_ids=ids).past_key_values
    # Three soft tokens precede a separate portion.
    assert found == [4, 4, 2, 7, 4]
    assert [states.shape[1] for states in cache.past.states] == [10, 11]


def test_unreachable_states_are_released() -> None:
    model = tiny_trm(decoder=tiny_decoder(max_position_embeddings=10))
    ids = torch.tensor([[5, 6, 7, 8, THINK, 9, 10, 11, THINK, 12]])
    with torch.no_grad():
        past = model(input_ids=ids).past_key_values.past
    # The second <think> is at position 12 of 16, and sees ten positions including itself.
    assert past.gone == 2
    assert sum(states.shape[1] for states in past.states) == past.columns - past.gone == 14


def test_when_everything_is_read_at_once() -> None:
    ids = torch.tensor([ROWS[4]])
    model = tiny_trm()
    model.model.prefill_chunk = 4
    found = widths(model)
    model(input_ids=ids)
    assert found == [10], "with a gradient"
    model.train().gradient_checkpointing_enable()
    with torch.no_grad():
        model(input_ids=ids)
    assert found == [10, 10], "gradient checkpointing drops the cache"
    model.eval()
    model.model.decoder.layers[0].mlp.up_proj.weight.ds_id = 0
    with torch.no_grad():
        model(input_ids=ids)
    assert found == [10, 10, 10], "another process may have fewer portions to read"
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny_trm(decoder=tiny_decoder(rope_parameters=scaled))
    model.model.prefill_chunk = 4
    found = widths(model)
    with torch.no_grad():
        model(input_ids=ids)
    assert found == [10], "frequencies that depend on the length"
