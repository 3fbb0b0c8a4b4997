"""The folder that a run leaves: which of its checkpoints is the best."""

from __future__ import annotations

from pathlib import Path

from llm_trm.errors import InputError
from llm_trm.files import named_in, read_json

#: Of a run: which checkpoints it has, and their folder.
INDEX_FILE, CHECKPOINTS_FOLDER = "index.json", "checkpoints"


def best_checkpoint(folder: Path, remedy: str) -> Path:
    """The checkpoint of the run in ``folder`` with the lowest validation loss, or its only one.

    Raises:
        InputError: There is none; the message ends in ``remedy``.
    """
    path = folder / INDEX_FILE
    index = read_json(path, remedy)
    try:
        name = index["best"] or index["last"]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is no index of checkpoints: {remedy}") from error
    return named_in(folder / CHECKPOINTS_FOLDER, name, path, remedy)
