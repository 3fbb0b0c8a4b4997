"""Loads the output of ``llm-trm train phase2``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm_trm.errors import InputError
from llm_trm.models.compression import DimensionCompressor, load_compressor
from llm_trm.models.run_folder import model_folder
from llm_trm.models.sequence_trm import SequenceTRM, load_sequence_trm
from llm_trm.ranges import DEPTH, require_in

#: The compressor's folder in a checkpoint.
COMPRESSOR_FOLDER = "compressor"

_REMEDY = "name a folder that `llm-trm train phase2` wrote"


def load_phase2(folder: Path) -> tuple[SequenceTRM, DimensionCompressor, dict[str, Any]]:
    """Load a phase 2 recursion, the compressor of its inputs, and metadata.

    Args:
        folder: The output of a run, whose best checkpoint is loaded, or a single checkpoint.

    Returns:
        The model with averaged weights in eval mode, the compressor, and facts. The facts include
        ``max_steps`` and ``halting`` for :meth:`SequenceTRM.reason`, ``language_model`` (the model whose
        states it was trained on), ``data`` and ``pairs`` (the folder and settings of its data), and
        ``validation``.

    Raises:
        InputError: A file is missing or invalid.
    """
    folder = model_folder(folder, _REMEDY)
    model, facts = load_sequence_trm(folder)
    require_in(DEPTH, "max_steps", facts.get("max_steps"), InputError, f"{folder}: ")
    compressor = load_compressor(folder / COMPRESSOR_FOLDER)
    if not isinstance(compressor, DimensionCompressor):
        raise InputError(f"{folder / COMPRESSOR_FOLDER} is not a compressor of single states: {_REMEDY}")
    return model, compressor.eval(), facts
