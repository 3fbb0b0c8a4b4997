"""Checkpoints that a Hugging Face Trainer wrote: which a folder has, their steps, how to load them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llm_trm.errors import InputError, one_line
from llm_trm.files import read_json
from llm_trm.models.loading import require_own_files
from llm_trm.ranges import AMOUNT, PLACE, Range, require_in

_STATE_FILE = "trainer_state.json"
_STATE: dict[str, Range] = {"global_step": PLACE, "max_steps": PLACE, "epoch": AMOUNT}


def checkpoint_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` is, or would be, in the folder of a run."""
    return folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, complete or not, in the order of their steps."""
    found = folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    return sorted((path for path in found if path.name.rpartition("-")[2].isdigit()), key=step_of)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in ``folder``; None if there is none.

    A checkpoint is complete if it has the Trainer's state, which is written last.

    Raises:
        InputError: A checkpoint's index of weights names files outside it.
    """
    complete = [path for path in checkpoints(folder) if (path / _STATE_FILE).exists()]
    for path in complete:
        require_own_files(path)
    return complete[-1] if complete else None


def trainer_state(checkpoint: Path) -> dict[str, Any]:
    """The progress of a run, as the Trainer recorded it.

    Raises:
        InputError: The file is missing, or a number in it makes no sense.
    """
    path = checkpoint / _STATE_FILE
    remedy = "start over with --overwrite, or delete the checkpoint"
    state = read_json(path, remedy)
    try:
        for name, within in _STATE.items():
            require_in(within, name, state[name])
        for record in state["log_history"]:
            require_in(PLACE, "log_history: step", record["step"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} does not record the progress of the run ({one_line(error)}): {remedy}"
        ) from error
    return dict(state)


def take_up_finished(trainer: Any, checkpoint: Path, *, best: bool) -> bool:
    """Load a run whose last update was made before ``checkpoint`` was written; False if updates are left.

    The Trainer itself would make one more update. It alone can load sharded weights.

    Args:
        trainer: A Trainer that has not started.
        checkpoint: The last checkpoint of the run.
        best: Whether to load the weights with the lowest loss instead of the last ones.
    """
    state = TrainerState.load_from_json(str(checkpoint / _STATE_FILE))
    if state.global_step < state.max_steps or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return False
    trainer.state = state
    lowest = checkpoint_of(checkpoint.parent, state.best_global_step or 0)
    trainer._load_from_checkpoint(str(lowest if best and lowest.is_dir() else checkpoint))
    return True


def forget_tied(model: Any, load_result: Any) -> None:
    """Remove an output head that shares the embeddings from the missing weights: no file has it."""
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    if model.config.tie_word_embeddings and set(load_result.missing_keys) <= tied:
        load_result.missing_keys.clear()
