"""Whether puzzles are fit for an evaluation: numbered as in training, and not those that were trained on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_trm.data.puzzles.dataset import INFO_FILE, PuzzleSplit, read_split, repeated
from llm_trm.errors import InputError
from llm_trm.models.puzzle.paper import PuzzleTRM


def check_puzzles(model: PuzzleTRM, facts: Mapping[str, Any], folder: Path, split: PuzzleSplit) -> str | None:
    """Compare the puzzles of ``folder`` with those that ``model`` was trained on.

    Args:
        model: Whose embeddings, if it has some, belong to the numbers of its training puzzles.
        facts: What its checkpoint says of it.
        folder: Where ``split`` is from.
        split: The puzzles to evaluate on.

    Returns:
        A line to tell, where puzzles were trained on, or nobody can say whether they were; else None.

    Raises:
        InputError: The folder has numbered its puzzles otherwise than in training, or has been written anew
            since.
    """
    trained = (facts.get("settings") or {}).get("data")
    source = None if facts.get("data") is None else Path(str(facts["data"]))
    numbered = bool(model.config.puzzle_dim) and model.config.num_puzzles > 1
    if trained is None or source is None:
        unknown = f"the model does not say what it was trained on: {folder} may number puzzles otherwise"
        return unknown if numbered else None
    if numbered:
        if "train" not in trained:
            raise InputError(
                "the model is of a time when checkpoints did not say which puzzle has which embedding, and "
                f"{folder} may have them in another order: train it again with `llm-trm train puzzle`"
            )
        if read_split(folder, "train").digest() != trained["train"]:
            raise InputError(
                f"{folder} holds other training puzzles than the model was trained on, or in another order, "
                "which have other embeddings: name the folder as it was with --data"
            )
        return None
    same_folder = source.resolve() == folder.resolve()
    if not (source / INFO_FILE).exists():
        return f"{source} is gone: nobody can tell whether these puzzles were trained on"
    learned = read_split(source, "train")
    if not _same(learned, trained):
        if same_folder:
            raise InputError(
                f"{folder} holds other puzzles than when the model was trained on it, and may test it with "
                "those that it was trained on: write it as it was, or name others with --data"
            )
        return f"{source} was written anew: nobody can tell whether these puzzles were trained on"
    if count := repeated(split, learned):
        return f"{count} of {len(split)} test puzzles are among those that the model was trained on"
    return None


def _same(learned: PuzzleSplit, trained: Mapping[str, Any]) -> bool:
    if "train" in trained:
        return bool(learned.digest() == trained["train"])
    # Of older checkpoints. Another order of the same puzzles makes no difference here.
    tokens = int(learned.inputs.sum()) + int(learned.labels.sum())
    return len(learned) == trained.get("puzzles") and tokens == trained.get("tokens")
