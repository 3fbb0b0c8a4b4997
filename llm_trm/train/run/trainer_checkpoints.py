"""Checkpoints that a Hugging Face Trainer wrote: which a folder has, their steps, how to load them."""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerState
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llm_trm.errors import InputError, few, one_line
from llm_trm.files import read_json
from llm_trm.manifest import MANIFEST_FILE, require_same_model, require_whole
from llm_trm.models.own_files import require_own_files
from llm_trm.ranges import AMOUNT, PLACE, Range, require_in, shown
from llm_trm.train.run.settings import START_OVER
from llm_trm.weights import read_tensors, read_torch

_STATE_FILE = "trainer_state.json"
_STATE: dict[str, Range] = {"global_step": PLACE, "max_steps": PLACE, "epoch": AMOUNT}
#: Further numbers, which may be missing or null.
_OPTIONAL: dict[str, Range] = {
    "best_global_step": PLACE,
    "num_train_epochs": PLACE,
    "train_batch_size": PLACE,
    "num_input_tokens_seen": PLACE,
    **dict.fromkeys(("total_flos", "eval_steps", "logging_steps", "save_steps"), AMOUNT),
}
_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-[0-9]{{1,18}}")
#: Files by which a checkpoint that a crash left incomplete is recognised.
_MARKS = (
    _STATE_FILE,
    MANIFEST_FILE,
    "training_args.bin",
    "optimizer*",
    "scheduler.pt",
    "rng_state*",
    ".tmp*",  # of safetensors
)
#: Files that the Trainer writes first, as users do who copy a model.
_BEGUN = ("model*.safetensors", "adapter_model*", "config.json", "tokenizer*", "*.jinja")
#: DeepSpeed keeps weights and states in such a folder.
_SHARDED = "global_step*"
#: What the Trainer needs, and patterns of the names of its files.
_NEEDED = {
    "weights": ("model*.safetensors", "adapter_model*", "pytorch_model*", _SHARDED),
    "optimizer.pt": ("optimizer.pt", "optimizer.bin", "optimizer_*", _SHARDED),
    "scheduler.pt": ("scheduler.pt", _SHARDED),
    "rng_state.pth": ("rng_state*.pth",),
}


def checkpoint_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` is, or would be, in the folder of a run."""
    return folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder`` that a Trainer wrote, complete or not, in the order of their steps.

    Not among them are links, and what users keep under a similar name.
    """
    found = folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    return sorted((path for path in found if _is_own(path)), key=step_of)


def _is_own(path: Path) -> bool:
    if not _NAME.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
        return False
    return _has(path, _MARKS) or not any(path.iterdir())


def _has(folder: Path, patterns: Iterable[str]) -> bool:
    """Whether a folder has a file whose name matches one of the patterns."""
    return any(next(folder.glob(pattern), None) for pattern in patterns)


def require_room(folder: Path, start: int) -> None:
    """Raise InputError if a user's folder or link is where a run would write a checkpoint after ``start``."""
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if not _NAME.fullmatch(path.name) or step_of(path) <= start or _is_own(path):
            continue
        if path.is_symlink() or not path.is_dir() or not _has(path, _BEGUN):
            raise InputError(f"{path} is no checkpoint of this run: move it to another folder")


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in ``folder`` that have the Trainer's state, which is written last, the newest first.

    Links are among them: users move checkpoints to other disks.
    """
    found = folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    named = (path for path in found if _NAME.fullmatch(path.name) and (path / _STATE_FILE).exists())
    return sorted(named, key=step_of, reverse=True)


def require_resumable(checkpoint: Path, remedy: str) -> None:
    """Check that a checkpoint has all that the Trainer needs, as it was written.

    The Trainer itself goes on without what is missing, with a fresh optimizer for example. It loads the best
    checkpoint at the end, so that one must be whole too.

    Raises:
        InputError: It cannot be resumed; the message ends in ``remedy``.
    """
    require_own_files(checkpoint)
    state = trainer_state(checkpoint, remedy)
    _require_files(checkpoint, remedy)
    best = checkpoint_of(checkpoint.parent, state.get("best_global_step") or 0)
    if best != checkpoint and best.is_dir():
        require_same_model(best, remedy)


def _require_files(checkpoint: Path, remedy: str) -> None:
    require_whole(checkpoint, remedy)
    for name, patterns in _NEEDED.items():
        if not _has(checkpoint, patterns):
            raise InputError(f"{checkpoint} has no {name}: {remedy}")
    # A run that diverged writes NaN with the right checksums, and an older version wrote no checksums.
    for path in sorted(checkpoint.glob("*.safetensors")):
        read_tensors(path, remedy)
    if not (checkpoint / MANIFEST_FILE).exists():
        for path in sorted(checkpoint.glob("*.pt*")):
            _require_archive(path, remedy)


def _require_archive(path: Path, remedy: str) -> None:
    """Raise InputError unless a file of ``torch.save`` contains an object, and has its checksums."""
    with safe_globals():
        content = read_torch(path, remedy, mapped=True)
    if not isinstance(content, dict):
        raise InputError(f"{path} does not contain the state of a Trainer: {remedy}")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile, zlib.error, ValueError, NotImplementedError) as error:
        raise InputError(f"{path} cannot be read ({one_line(error)}): {remedy}") from error
    if damaged is not None:
        raise InputError(f"{path} is damaged (the checksum of {damaged} differs): {remedy}")


def trainer_state(checkpoint: Path, remedy: str = START_OVER) -> dict[str, Any]:
    """The progress of a run, as the Trainer recorded it.

    Raises:
        InputError: The file is missing, or a value in it makes no sense; the message ends in ``remedy``.
    """
    path = checkpoint / _STATE_FILE
    state = read_json(path, remedy)
    try:
        for name, within in _STATE.items():
            require_in(within, name, state[name])
        for name, within in _OPTIONAL.items():
            if state.get(name) is not None:
                require_in(within, name, state[name])
        for record in state["log_history"]:
            require_in(PLACE, "log_history: step", record["step"])
            for name, value in record.items():
                if not _is_number(value) and (value is not None or name.startswith("eval_")):
                    raise ValueError(f"log_history: {name} must be a number, not {shown(value)}")
        if state.get("best_metric") is not None and not _is_number(state["best_metric"]):
            raise ValueError("best_metric must be a number")
        if not isinstance(state.get("stateful_callbacks", {}), dict):
            raise ValueError("stateful_callbacks must be a table")
        TrainerState(**state)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} does not record the progress of the run ({one_line(error)}): {remedy}"
        ) from error
    return dict(state)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)  # NaN is one: a loss may be


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


class StrictTrainer(Trainer):
    """A Trainer that refuses checkpoints without all weights of its model, instead of warning of them."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except (KeyError, RuntimeError) as error:
            raise InputError(
                f"{resume_from_checkpoint} does not contain the weights of this run's model "
                f"({one_line(error, 120)}): {START_OVER}"
            ) from error

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        _forget_tied(self.model, load_result)
        if missing := sorted(load_result.missing_keys):
            raise InputError(
                f"a checkpoint in {self.args.output_dir} lacks {len(missing)} weights of this run's model "
                f"({few(missing)}): {START_OVER}"
            )
        super()._issue_warnings_after_load(load_result)


def _forget_tied(model: Any, load_result: Any) -> None:
    """Remove an output head that shares the embeddings from the missing weights: no file has it."""
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    if model.config.tie_word_embeddings and set(load_result.missing_keys) <= tied:
        load_result.missing_keys.clear()
