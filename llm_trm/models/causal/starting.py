"""Initialises a language model's reasoner from the recursion that ``llm-trm train phase2`` trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llm_trm.errors import InputError
from llm_trm.models.causal.reasoners import SequenceReasoner
from llm_trm.models.compression import DimensionCompressor
from llm_trm.models.phase2 import load_phase2
from llm_trm.models.sequence_trm import SequenceTRM


@dataclass(frozen=True)
class Start:
    """A recursion and compressor trained by phase 2.

    Attributes:
        folder: Folder they were read from.
        trm, compressor: The trained modules.
        language_model: Name of the language model whose states they were trained on.
        settings: Matching settings of a :class:`~llm_trm.models.causal.TRMConfig`.
    """

    folder: Path
    trm: SequenceTRM
    compressor: DimensionCompressor
    language_model: str
    settings: dict[str, Any]

    @torch.no_grad()
    def load_into(self, model: Any) -> None:
        """Copy these weights into ``model``, a ``TRMForCausalLM`` or a ``PeftModel`` around one.

        Raises:
            InputError: The sizes of its reasoner differ.
        """
        reasoner = _sequence_reasoner(model)
        for part, given in ((reasoner.compressor, self.compressor), (reasoner.trm, self.trm)):
            own, new = part.state_dict(), given.state_dict()
            for name, weight in own.items():
                if name not in new or new[name].shape != weight.shape:
                    found = list(new[name].shape) if name in new else "nothing"
                    raise InputError(
                        f"{self.folder} has {found} where this model has {name} {list(weight.shape)}: wrap "
                        "the language model that phase 2 was trained on, with the same recursion settings"
                    )
            part.load_state_dict(new)


def start_from_phase2(folder: Path) -> Start:
    """Read the output of ``llm-trm train phase2``; see :func:`~llm_trm.models.phase2.load_phase2`.

    Raises:
        InputError: A file is missing or invalid.
    """
    trm, compressor, facts = load_phase2(folder)
    sizes = trm.config
    settings = {
        "reasoner": "sequence",
        "d_compressed": sizes.d_compressed,
        "n_layers": sizes.n_layers,
        "n_heads": sizes.n_heads,
        "n_latent_steps": sizes.n_latent_steps,
        "n_deep_recursions": sizes.n_deep_recursions,
        "supervision_steps": int(facts["max_steps"]),
        "halting": facts["halting"],
    }
    return Start(folder, trm, compressor, str(facts["language_model"]), settings)


def require_width(start: Start, width: int) -> None:
    """Raise InputError unless the compressor of ``start`` accepts a language model's states of ``width``."""
    if start.compressor.d_model != width:
        raise InputError(
            f"{start.folder} was trained on states of width {start.compressor.d_model} (from "
            f"{start.language_model}), but this language model's have {width}: train phase 2 for this model"
        )


def _sequence_reasoner(model: Any) -> Any:
    """The trained reasoner, not the original copy that peft keeps."""
    for name, module in model.named_modules():
        if isinstance(module, SequenceReasoner) and "original_module" not in name:
            return module
    raise InputError("this model has no sequence reasoner, the only kind that phase 2 trains")
