"""Trackers of a run, through accelerate: wandb, tensorboard, or JSON lines."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_trm.choices import Track
from llm_trm.data.processes import world_size
from llm_trm.errors import InputError
from llm_trm.extras import require
from llm_trm.files import write_text
from llm_trm.text import read_lines

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker


#: The file that ``--track jsonl`` writes in the folder of the run.
JSONL_FILE = "metrics.jsonl"

_NEEDS = {"wandb": ("wandb",), "tensorboard": ("tensorboard",), "jsonl": ()}


def new_accelerator(
    track: Track | None, folder: Path, *, device: str = "auto", resumed_at: int | None = None
) -> Accelerator:
    """An :class:`accelerate.Accelerator` whose tracker has not started: nothing is written yet.

    Args:
        track: Where ``accelerator.log(values, step)`` logs; None for nowhere.
        folder: Folder of the run, for tensorboard's event files and ``metrics.jsonl``.
        device: ``"cpu"`` uses no GPU; for any other value, accelerate chooses.
        resumed_at: Step that a resumed run continues from: lines of later steps will be dropped from
            ``metrics.jsonl``. None starts a new file.

    Raises:
        InputError: accelerate or the tracker's package is not installed, or the environment variables of a
            launch make no sense.
    """
    require("train", "accelerate")
    world_size()  # otherwise accelerate would end with a traceback
    from accelerate import Accelerator

    require_tracker(track)
    accelerator = Accelerator(cpu=device == "cpu")
    track_with(accelerator, track, folder, resumed_at=resumed_at)
    return accelerator


def track_with(
    accelerator: Accelerator, track: Track | None, folder: Path, *, resumed_at: int | None = None
) -> None:
    """Give an accelerator the tracker of :func:`new_accelerator`, which has not started."""
    from accelerate.tracking import filter_trackers

    accelerator.project_configuration.set_directories(str(folder))
    tracker = json_tracker(folder, resumed_at) if track == "jsonl" else track
    accelerator.log_with = filter_trackers(tracker, accelerator.logging_dir)


def start_tracking(accelerator: Accelerator, project: str, config: Mapping[str, Any]) -> None:
    """Start the tracker's run; the folder must exist.

    Args:
        project: Name of the project.
        config: Settings of the run, which the tracker keeps. Values other than numbers, strings and bools
            become strings.
    """
    if accelerator.log_with:
        plain = {
            name: value if isinstance(value, (bool, int, float, str)) else str(value)
            for name, value in config.items()
        }
        accelerator.init_trackers(project, plain)


def finish_tracking(accelerator: Accelerator) -> None:
    """Close the trackers but, unlike ``accelerator.end_training()``, not the process group."""
    for tracker in accelerator.trackers:
        tracker.finish()


def require_tracker(track: Track | None) -> None:
    """Raise InputError unless the package of the tracker is installed."""
    for package in _NEEDS[track] if track else ():
        if importlib.util.find_spec(package) is None:
            raise InputError(f"--track {track} needs {package}: pip install {package}, or use --track jsonl")


def json_tracker(folder: Path, resumed_at: int | None) -> GeneralTracker:
    """A tracker that appends one JSON object per call to ``metrics.jsonl`` in ``folder``.

    Call its ``start()`` once the folder exists. ``resumed_at``: see :func:`new_accelerator`.
    """
    from accelerate.tracking import GeneralTracker, on_main_process

    path = folder / JSONL_FILE

    class JSONLines(GeneralTracker):  # type: ignore[misc]
        name = "jsonl"
        requires_logging_directory = False

        @property
        def tracker(self) -> Path:
            return path

        @on_main_process
        def start(self) -> None:
            write_text(path, "" if resumed_at is None else lines_until(path, resumed_at))

        @on_main_process
        def store_init_configuration(self, values: dict[str, Any]) -> None:
            """Does nothing: the run's folder has its settings."""

        @on_main_process
        def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")

    return JSONLines()


def lines_until(path: Path, step: int) -> str:
    """The complete lines of ``path`` up to ``step``, without a line that a crash cut short."""
    kept = []
    for line in read_lines(path, only_text=True) if path.exists() else ():
        try:
            at = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if at is None or (isinstance(at, (int, float)) and at <= step):
            kept.append(line + "\n")
    return "".join(kept)
