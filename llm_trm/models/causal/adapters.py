"""A peft model that wraps a language model with a recursion and writes our model card. Needs peft."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModelForCausalLM

from llm_trm.models.causal.card import CardMixin, write_about


class TRMPeftModel(CardMixin, PeftModelForCausalLM):
    """Writes our card instead of peft's template, and the other files that ``load_latent_model`` needs."""

    def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """See :meth:`PeftModel.save_pretrained`."""
        super().save_pretrained(save_directory, *args, **kwargs)
        # After the weights: commands take the facts file as a sign that the weights are complete.
        if kwargs.get("is_main_process", True):
            write_about(self, Path(save_directory))

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Do nothing; :meth:`save_pretrained` writes the card."""


@contextmanager
def quietly() -> Iterator[None]:
    """Suppress the warning that transformers 5 issues whenever peft 0.21 wraps a model."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        yield


def with_card(model: Any) -> Any:
    """Turn a ``PeftModelForCausalLM`` into a :class:`TRMPeftModel` in place, since peft picks the class."""
    model.__class__ = TRMPeftModel
    return model
