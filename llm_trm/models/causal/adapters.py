"""peft's model around a language model with a recursion, with a model card of our own. Needs peft."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModelForCausalLM

from llm_trm.models.causal.card import Carded, write_about


class TRMPeftModel(Carded, PeftModelForCausalLM):
    """Writes our card in place of peft's template, and what ``load_latent_model`` needs besides."""

    def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """See :meth:`PeftModel.save_pretrained`."""
        super().save_pretrained(save_directory, *args, **kwargs)
        # Behind the weights: commands take the facts for a sign that they are whole.
        if kwargs.get("is_main_process", True):
            write_about(self, Path(save_directory))

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Leaves it to :meth:`save_pretrained`."""


@contextmanager
def quietly() -> Iterator[None]:
    """Without the warning that peft 0.21 draws from transformers 5 whenever it wraps a model."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        yield


def with_card(model: Any) -> Any:
    """Make a ``PeftModelForCausalLM`` a :class:`TRMPeftModel`, in place: peft chooses the class itself."""
    model.__class__ = TRMPeftModel
    return model
