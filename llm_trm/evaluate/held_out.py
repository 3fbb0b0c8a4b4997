"""Checks that pairs for an evaluation do not contain problems that the model was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llm_trm.errors import InputError
from llm_trm.text import normalise_spaces

if TYPE_CHECKING:
    from llm_trm.data.pairs import PairFiles

_REMEDY = "generate pairs of other problems (llm-trm datagen --split test)"
#: Setting of pair files with a fingerprint of all problems.
_PROBLEMS = "problems_sha256"


def require_held_out(
    pairs: PairFiles,
    training_settings: Mapping[str, Any],
    training: PairFiles | None = None,
    *,
    otherwise: str,
) -> None:
    """Raise InputError if problems of ``pairs`` were used in training.

    Args:
        training_settings: Settings of the training pairs, from the checkpoint; may be empty.
        training: The training pairs, if available, to compare individual problems.
        otherwise: An alternative remedy for the message.
    """
    fingerprint = pairs.settings.get(_PROBLEMS)
    if fingerprint is not None and fingerprint == training_settings.get(_PROBLEMS):
        raise InputError(
            f"{pairs.folder} has the problems that the model is trained on: {_REMEDY}, or {otherwise}"
        )
    if training is None:
        return
    if shared := shared_problems(pairs, training):
        raise InputError(
            f"{pairs.folder}: {shared} of its {pairs.samples} problems are in {training.folder}, which the "
            f"model is trained on: {_REMEDY}, or {otherwise}"
        )


def shared_problems(pairs: PairFiles, training: PairFiles) -> int:
    """Number of ``pairs`` whose problem is also in ``training``."""
    seen = {normalise_spaces(str(record["problem"])) for record in training.records()}
    return sum(normalise_spaces(str(record["problem"])) in seen for record in pairs.records())
