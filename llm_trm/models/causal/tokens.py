"""Adds ``<think>`` and ``</think>`` to tokenizers that do not have them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from llm_trm.data.passages import own_token
from llm_trm.data.tags import END_THINK, THINK
from llm_trm.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_logger = logging.getLogger(__name__)


def add_think_tokens(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> list[str]:
    """Ensure that ``<think>`` and ``</think>`` are single tokens of ``tokenizer`` and ``model``.

    Adds missing tokens to ``tokenizer``, grows the embeddings of ``model`` to fit them, and logs a warning.
    Sets the ids in ``model.config`` if it is a :class:`~llm_trm.models.causal.TRMConfig`.

    Returns:
        The tokens that were added.
    """
    from llm_trm.models.causal.config import TRMConfig

    added = [tag for tag in (THINK, END_THINK) if own_token(tokenizer, tag) is None]
    # Not special, as in SmolLM3's tokenizer: the tags are part of the output and survive skip_special_tokens.
    tokenizer.add_tokens(added, special_tokens=False)
    before = _rows(model)
    if len(tokenizer) > before:
        model.resize_token_embeddings(len(tokenizer))
    if added:
        after = _rows(model)
        grown = f"grown from {before} to {after} rows" if after > before else f"of {before} rows fit them"
        _logger.warning("added %s to the tokenizer; embeddings %s", " and ".join(added), grown)
    if isinstance(model.config, TRMConfig):
        model.config.think_token_id, model.config.end_think_token_id = think_ids(tokenizer)
    return added


def _rows(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def think_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Ids of ``<think>`` and ``</think>``.

    Raises:
        InputError: One of them is not a single token.
    """
    think, end_think = (own_token(tokenizer, tag) for tag in (THINK, END_THINK))
    if think is None or end_think is None:
        missing = THINK if think is None else END_THINK
        raise InputError(f"{missing} is not a single token: call add_think_tokens(tokenizer, model)")
    return think, end_think
