"""Loads what ``llm-trm train phase2`` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm_trm.errors import InputError
from llm_trm.models.compression import DimensionCompressor, load_compressor
from llm_trm.models.run_folder import INDEX_FILE, best_checkpoint
from llm_trm.models.sequence_trm import SequenceTRM, load_sequence_trm
from llm_trm.ranges import DEPTH, require_in

#: Of a checkpoint: the folder of its compressor.
COMPRESSOR_FOLDER = "compressor"

_REMEDY = "name a folder that `llm-trm train phase2` wrote"


def load_phase2(folder: Path) -> tuple[SequenceTRM, DimensionCompressor, dict[str, Any]]:
    """The recursion, the compressor that it lives behind, and what is known of it.

    Args:
        folder: The output of a run, of which the best checkpoint is taken, or a single checkpoint.

    Returns:
        The model with its averaged weights in eval mode; the compressor; and facts, among them
        ``max_steps`` and ``halting`` for :meth:`SequenceTRM.reason`, ``language_model``, whose states it was
        trained on, ``data`` and ``pairs``, the folder and the settings of these, and ``validation``.

    Raises:
        InputError: A missing or broken file.
    """
    if (folder / INDEX_FILE).exists():
        folder = best_checkpoint(folder, _REMEDY)
    model, facts = load_sequence_trm(folder)
    require_in(DEPTH, "max_steps", facts.get("max_steps"), InputError, f"{folder}: ")
    compressor = load_compressor(folder / COMPRESSOR_FOLDER)
    if not isinstance(compressor, DimensionCompressor):
        raise InputError(f"{folder / COMPRESSOR_FOLDER} is no compressor of single states: {_REMEDY}")
    return model, compressor.eval(), facts
