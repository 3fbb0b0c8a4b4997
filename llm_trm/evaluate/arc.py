"""Evaluates ARC test puzzles per task: samples whole tasks, and votes on their predictions."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from llm_trm.data.puzzles.arc_folder import ArcKey, read_arc
from llm_trm.data.puzzles.arc_vote import ArcBallot
from llm_trm.data.puzzles.dataset import PuzzleSplit
from llm_trm.errors import InputError
from llm_trm.models.puzzle.paper import Prediction


def read_key(folder: Path, split: PuzzleSplit) -> ArcKey:
    """Read ``arc.json`` of ``folder``, with only the tests in ``split``.

    Raises:
        InputError: ``arc.json`` is missing, invalid, or lacks identifiers of ``split``.
    """
    key = read_arc(folder)
    names = set()
    for puzzle in sorted(set(split.puzzles.tolist())):
        entry = key.identifiers[puzzle] if puzzle < len(key.identifiers) else None
        if entry is None or entry[0] not in key.tests:
            raise InputError(
                f"{folder / 'arc.json'} has no test for puzzle {puzzle}: write the folder again "
                "with `llm-trm data arc`"
            )
        names.add(entry[0])
    return _with(key, names)


def draw_tasks(key: ArcKey, split: PuzzleSplit, count: int, seed: int) -> tuple[ArcKey, PuzzleSplit]:
    """Sample up to ``count`` tasks, with all of their puzzles."""
    names = sorted(key.tests)
    drawn = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))[:count]
    chosen = {names[index] for index in drawn.tolist()}
    wanted = {
        number for number, entry in enumerate(key.identifiers) if entry is not None and entry[0] in chosen
    }
    rows = torch.isin(split.puzzles, torch.tensor(sorted(wanted), dtype=split.puzzles.dtype))
    return _with(key, chosen), PuzzleSplit(split.inputs[rows], split.labels[rows], split.puzzles[rows])


def cast(ballot: ArcBallot, inputs: Tensor, puzzles: Tensor, found: Prediction) -> None:
    """Add the votes of a batch: inputs [B, 900], puzzle identifiers [B] and predictions."""
    ballot.add(
        inputs.cpu().numpy(),
        found.tokens.cpu().numpy(),
        puzzles.cpu().numpy(),
        found.halt_logits.cpu().double().sigmoid().numpy(),
    )


def _with(key: ArcKey, names: set[str]) -> ArcKey:
    return ArcKey(key.identifiers, {name: pairs for name, pairs in key.tests.items() if name in names})
