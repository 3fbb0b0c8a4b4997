"""Finds the best checkpoint in the output folder of a run."""

from __future__ import annotations

from pathlib import Path

from llm_trm.errors import InputError
from llm_trm.files import named_in, read_json
from llm_trm.manifest import require_same_model

#: The index of a run's checkpoints, and the folder of the checkpoints.
INDEX_FILE, CHECKPOINTS_FOLDER = "index.json", "checkpoints"


def model_folder(folder: Path, remedy: str) -> Path:
    """The folder of the model to load: the best checkpoint of a run, or ``folder`` itself.

    Raises:
        InputError: The run has no checkpoint, or a file of the model has changed since it was written; the
            message ends in ``remedy``.
    """
    if (folder / INDEX_FILE).exists():
        folder = best_checkpoint(folder, remedy)
    require_same_model(folder, remedy)
    return folder


def best_checkpoint(folder: Path, remedy: str) -> Path:
    """The checkpoint with the lowest validation loss of the run in ``folder``, or the last checkpoint.

    Raises:
        InputError: The run has no checkpoint; the message ends in ``remedy``.
    """
    path = folder / INDEX_FILE
    index = read_json(path, remedy)
    try:
        name = index["best"] or index["last"]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is not an index of checkpoints: {remedy}") from error
    return named_in(folder / CHECKPOINTS_FOLDER, name, path, remedy)
