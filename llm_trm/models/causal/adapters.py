"""A peft model that wraps a language model with a recursion and writes our model card. Needs peft."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PeftModelForCausalLM, get_peft_model_state_dict
from torch import Tensor

from llm_trm.errors import InputError, few, one_line
from llm_trm.models.causal.card import CardMixin, write_about
from llm_trm.weights import RESTORE, read_tensors, read_torch, require_finite

_WEIGHTS, _PICKLED_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin"


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


def read_adapters(model: Any, folder: Path, base: str) -> TRMPeftModel:
    """Wrap ``model`` with the adapters in ``folder``, in eval mode.

    Args:
        model: A ``TRMForCausalLM``.
        folder: A folder with ``adapter_config.json``.
        base: Name of the language model inside ``model``, for messages.

    Raises:
        InputError: A file is missing or invalid, the adapters are incomplete or contain NaN, or they belong
            to another model.
    """
    path = folder / _WEIGHTS
    if not path.exists() and (folder / _PICKLED_WEIGHTS).exists():
        path = folder / _PICKLED_WEIGHTS
        tensors = read_torch(path, RESTORE)
        if not isinstance(tensors, dict) or not all(isinstance(one, Tensor) for one in tensors.values()):
            raise InputError(f"{path} does not contain tensors by name: {RESTORE}")
        require_finite(tensors.items(), str(path), RESTORE)
    else:
        # Without the file, peft would look for it on the hub.
        tensors = read_tensors(path, RESTORE)
    lacking = f"does not contain all weights that {folder / 'adapter_config.json'} describes"
    try:
        with quietly():
            adapted = with_card(PeftModel.from_pretrained(model, folder))
        # peft leaves missing weights as they are, which for the reasoner is at random.
        wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        raise InputError(
            f"{folder} does not fit the language model {base}: it was trained on a different one"
        ) from error
    except KeyError as error:
        raise InputError(f"{path} {lacking} ({error.args[0]}): {RESTORE}") from error
    # peft follows its configuration, which may be any file: any exception can result.
    except Exception as error:
        raise InputError(
            f"the adapters in {folder} cannot be loaded ({one_line(error)}): restore their files, or "
            "train again"
        ) from error
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise InputError(f"{path} {lacking} ({few(missing)}): {RESTORE}")
    return adapted


@contextmanager
def quietly() -> Iterator[None]:
    """Suppress warnings: transformers 5 issues one whenever peft 0.21 wraps a model.

    That weights are missing is an error of :func:`read_adapters`.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        warnings.filterwarnings("ignore", ".*missing adapter keys", UserWarning)
        yield


def with_card(model: Any) -> Any:
    """Turn a ``PeftModelForCausalLM`` into a :class:`TRMPeftModel` in place, since peft picks the class."""
    model.__class__ = TRMPeftModel
    return model
