"""Tests that the cache has both names with every transformers version, without warnings."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from llm_trm.errors import InputError
from llm_trm.models.causal import TRMCache
from llm_trm.upstream import cache_of
from tests.causal.tiny import THINK, tiny_trm

NAMES = ["cache", "past_key_values"]
IDS = torch.tensor([[5, THINK, 6, 7]])

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(autouse=True)
def _transformers_says_nothing(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    # Its loggers do not propagate, and warn once per message.
    logger = logging.getLogger("transformers")
    logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]
    logger.addHandler(caplog.handler)
    yield
    logger.removeHandler(caplog.handler)
    assert not [
        record.getMessage() for record in caplog.get_records("call") if record.levelno >= logging.WARNING
    ]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_forward_continues_with_cache_under_either_name(name: str) -> None:
    model = tiny_trm()
    whole = model(IDS).logits
    for part in (model, model.model):
        first = part(IDS[:, :3], use_cache=True)
        second = part(IDS[:, 3:], **{name: first[name]})
        states = second[0] if part is model else model.lm_head(second[0])
        torch.testing.assert_close(states[:, 0], whole[:, 3])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_outputs_have_the_cache_under_either_name(name: str) -> None:
    model = tiny_trm()
    for use_trm in (True, False):
        output = model(IDS, use_cache=True, use_trm=use_trm)
        cache = getattr(output, name)
        assert isinstance(cache, TRMCache) == use_trm
        assert output[name] is cache and output.get(name) is cache and name in output
        assert output.to_tuple()[1] is cache and cache_of(output) is cache
        assert len([key for key in output if key in NAMES]) == 1
    without = model(IDS, use_cache=False)
    assert getattr(without, name) is None and name not in without and without.get(name) is None


@torch.no_grad()
def test_positional_arguments_keep_their_places() -> None:
    model = tiny_trm()
    cache = model(IDS[:, :3], use_cache=True).cache
    found = model(IDS[:, 3:], None, None, cache).logits
    torch.testing.assert_close(found[:, 0], model(IDS).logits[:, 3])


@pytest.mark.parametrize("name", NAMES)
def test_generate_continues_with_cache_under_either_name(name: str) -> None:
    model = tiny_trm()
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    first = model.generate(IDS, **options)
    longer = torch.cat((first.sequences, IDS), 1)
    expected = model.generate(longer, **options).sequences
    assert torch.equal(model.generate(longer, **{name: cache_of(first)}, **options).sequences, expected)


def test_both_names_at_once_are_refused() -> None:
    model = tiny_trm()
    with torch.no_grad():
        cache = model(IDS, use_cache=True).cache
    both = {name: cache for name in NAMES}
    for call in (model, model.model, model.generate):
        with pytest.raises(InputError, match="the same argument"):
            call(IDS, **both)
