"""Checks that puzzles for an evaluation are numbered as in training and were not trained on."""

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
        model: The model. Its puzzle embeddings, if any, belong to the identifiers of its training puzzles.
        facts: Facts of its checkpoint.
        folder: Folder of ``split``.
        split: The puzzles to evaluate on.

    Returns:
        A warning if puzzles were or may have been trained on, else None.

    Raises:
        InputError: The folder numbers its puzzles differently than in training, or has been rewritten since.
    """
    trained = (facts.get("settings") or {}).get("data")
    source = None if facts.get("data") is None else Path(str(facts["data"]))
    numbered = bool(model.config.puzzle_dim) and model.config.num_puzzles > 1
    if trained is None or source is None:
        unknown = f"the model's training data is unknown: {folder} may number puzzles differently"
        return unknown if numbered else None
    if numbered:
        if "train" not in trained:
            raise InputError(
                "the model's checkpoint is too old to record which puzzle has which embedding, and "
                f"{folder} may have another order: train it again with `llm-trm train puzzle`"
            )
        if read_split(folder, "train").digest() != trained["train"]:
            raise InputError(
                f"the training puzzles in {folder} differ, in content or order, from those that the model "
                "was trained on, so embeddings do not match: name the original folder with --data"
            )
        return None
    same_folder = source.resolve() == folder.resolve()
    if not (source / INFO_FILE).exists():
        return f"{source} no longer exists: these puzzles may have been trained on"
    learned = read_split(source, "train")
    if not _same(learned, trained):
        if same_folder:
            raise InputError(
                f"{folder} has changed since the model was trained on it, so its test puzzles may have been "
                "trained on: restore it, or name another folder with --data"
            )
        return f"{source} has been rewritten: these puzzles may have been trained on"
    if count := repeated(split, learned):
        return f"{count} of {len(split)} test puzzles are among those that the model was trained on"
    return None


def _same(learned: PuzzleSplit, trained: Mapping[str, Any]) -> bool:
    if "train" in trained:
        return bool(learned.digest() == trained["train"])
    # Older checkpoints. The order of the puzzles does not matter here.
    tokens = int(learned.inputs.sum()) + int(learned.labels.sum())
    return len(learned) == trained.get("puzzles") and tokens == trained.get("tokens")
