"""Whether pairs are fit for an evaluation: a model must not have been trained on their problems."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llm_trm.errors import InputError
from llm_trm.text import words_of

if TYPE_CHECKING:
    from llm_trm.data.pairs import PairFiles

_REMEDY = "generate pairs of other problems (llm-trm datagen --split test)"
#: Of the settings of pair files: a fingerprint of all problems that were asked.
_PROBLEMS = "problems_sha256"


def require_held_out(
    pairs: PairFiles,
    training_settings: Mapping[str, Any],
    training: PairFiles | None = None,
    *,
    otherwise: str,
) -> None:
    """Raise InputError if problems of ``pairs`` were trained on.

    Args:
        training_settings: The settings of the training pairs, as the checkpoint has them; may be empty.
        training: The training pairs, if they are at hand: then problem is compared with problem.
        otherwise: What else than making other pairs puts it right, for the message.
    """
    fingerprint = pairs.settings.get(_PROBLEMS)
    if fingerprint is not None and fingerprint == training_settings.get(_PROBLEMS):
        raise InputError(
            f"{pairs.folder} holds the problems that the model is trained on: {_REMEDY}, or {otherwise}"
        )
    if training is None:
        return
    if shared := shared_problems(pairs, training):
        raise InputError(
            f"{pairs.folder}: {shared} of its {pairs.samples} problems are in {training.folder}, which the "
            f"model is trained on: {_REMEDY}, or {otherwise}"
        )


def shared_problems(pairs: PairFiles, training: PairFiles) -> int:
    """How many of ``pairs`` are of a problem that ``training`` has too."""
    seen = {words_of(str(record["problem"])) for record in training.records()}
    return sum(words_of(str(record["problem"])) in seen for record in pairs.records())
